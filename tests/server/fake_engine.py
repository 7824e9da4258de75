# SPDX-License-Identifier: Apache-2.0
"""A process that speaks as the engine's does, and does what a prompt's first token says."""

import sys
import time

import msgspec
import zmq

from server import messages
from slora_jax.core import FinishReason, SamplingParams
from slora_jax.stats import EngineStats

ANSWER, SILENCE, EXIT, FAIL, ERROR, REJECT, HALF = range(7)
TOKEN_S = 0.002


def stats(running: int) -> EngineStats:
    return EngineStats(
        running=running,
        waiting=0,
        running_adapters=(),
        waiting_adapters=(),
        pages=100,
        kv_pages=0,
        free_pages=100,
        residents=(),
        loaded=0,
        in_host_memory=0,
        hits=0,
        misses=0,
        evictions=0,
        preemptions=0,
        steps=0,
        load_seconds=(),
    )


def delta(request_id: str, tokens: list[int], **fields) -> messages.Delta:
    rest = dict.fromkeys(("finish_reason", "stop_reason", "logprobs", "queue_seconds"))
    return messages.Delta(id=request_id, tokens=tokens, text="x" * len(tokens), **rest | fields)


class FakeEngine:
    def __init__(self, socket: zmq.Socket, launch: messages.Launch) -> None:
        self._socket = socket
        self._options = launch.options
        self._running: dict[str, list[int]] = {}  # tokens left to give, and given
        self._silent: set[str] = set()
        self.send(
            messages.Ready(
                max_model_len=64,
                max_num_seqs=launch.options["max_num_seqs"],
                vocab_size=260,
                page_size=16,
                num_pages=100,
                page_bytes=1,
                max_loras=8,
                device="fake",
                failed={name: "it is lost" for name in launch.adapters} if launch.restart else {},
            )
        )

    def send(self, message: messages.FromEngine) -> None:
        self._socket.send(messages.encode(message))

    def run(self) -> None:
        while True:
            while self._socket.poll(1000 * TOKEN_S):
                self.handle(messages.decode_to_engine(self._socket.recv()))
            self.step()

    def handle(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Generate(prompt=[]):
                self.send(messages.Refused(message.ids[0], "the prompt is empty", "prompt"))
            case messages.Generate():
                for request_id in message.ids:
                    self.begin(request_id, message.prompt[0], message.params)
            case messages.Abort():
                for request_id in message.ids:
                    self._running.pop(request_id, None)
                    self._silent.discard(request_id)
            case messages.LoadAdapter() if message.name == "hangs":
                time.sleep(0.5)
                sys.exit(5)
            case messages.LoadAdapter() if message.name == "unreadable":
                self.send(messages.Done(message.call, "its file cannot be read", True))
            case messages.LoadAdapter() | messages.UnloadAdapter():
                self.send(messages.Done(message.call, None))
            case messages.Stop():
                sys.exit(0)

    def begin(self, request_id: str, mode: int, params: SamplingParams) -> None:
        match mode:
            case 1:
                self._silent.add(request_id)
            case 2:
                sys.exit(3)
            case 3:
                self.send(messages.Failed("a step failed"))
                time.sleep(1)  # JAX takes its time to end as well
                sys.exit(1)
            case 4:
                reason = {"finish_reason": FinishReason.ERROR, "stop_reason": "it overflows"}
                self.send(messages.Outputs([delta(request_id, [], **reason)]))
            case 5:
                reason = {"finish_reason": FinishReason.REJECTED, "stop_reason": "too late"}
                self.send(messages.Outputs([delta(request_id, [], **reason)]))
            case 6:
                self.send(messages.Outputs([delta(request_id, [7])]))
                self._silent.add(request_id)
            case _:
                self._running[request_id] = [params.max_tokens or 1, 0]

    def step(self) -> None:
        deltas = []
        for request_id, progress in list(self._running.items()):
            progress[0] -= 1
            last = progress[0] == 0
            reason = FinishReason.LENGTH if last else None
            deltas.append(delta(request_id, [7], finish_reason=reason))
            if last:
                del self._running[request_id]
        if deltas:
            self.send(messages.Outputs(deltas))
        self.send(messages.Report(stats(len(self._running) + len(self._silent))))


def main() -> None:
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=messages.Launch)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.linger = 200
    socket.connect(launch.address)
    if launch.options.get("refused"):
        socket.send(messages.encode(messages.Failed("this model is not supported")))
        time.sleep(launch.options.get("lingers", 0))
        sys.exit(2)
    FakeEngine(socket, launch).run()


if __name__ == "__main__":
    main()
