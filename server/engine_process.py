# SPDX-License-Identifier: Apache-2.0
"""The process that owns the device: `python -m server.engine_process`.

It is started by the front end and ends when the front end does, however that ends: its standard
input is a pipe that the kernel closes then.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from server.messages import (
    Abort,
    Delta,
    Done,
    Failed,
    FromEngine,
    Generate,
    Launch,
    LoadAdapter,
    Outputs,
    PromptLogprobs,
    Ready,
    Refused,
    Report,
    Stop,
    ToEngine,
    UnloadAdapter,
    decode_to_engine,
    encode,
)
from slora_jax.cluster import ALONE, ClusterError
from slora_jax.core import RequestError, RequestOutput

if TYPE_CHECKING:
    from slora_jax import Engine

_REPORT_BUSY_S = 0.2
_REPORT_IDLE_S = 1.0
_LINGER_MS = 1000  # for the last words
_PROMPT_PART = 256  # positions
_RECEIVE_S = 0.01  # in which messages are taken between two steps
_CALLS = 32  # at a time: threads that wait for those that read
_CALL_POLL_MS = 5  # while adapters are being loaded and no step runs

logger = logging.getLogger("slora_jax.server")


class EngineProcess:
    """Takes requests from the front end, steps the engine, and sends what comes out.

    Args:
        engine: that nobody else uses.
        socket: to the front end.
    """

    def __init__(self, engine: "Engine", socket: zmq.Socket) -> None:
        self._engine = engine
        self._socket = socket
        self._threads = ThreadPoolExecutor(_CALLS, "calls")
        self._calls = 0  # under way
        self._done: SimpleQueue[Done] = SimpleQueue()
        self._reported = 0.0
        self._running = True

    def run(self) -> None:
        """Serves until it is told to stop."""
        while self._running:
            self._receive()
            outputs = self._engine.step() if self._engine.has_unfinished else []
            for output in outputs:
                self._send_prompt_logprobs(output)
            if outputs:
                self._send(Outputs([_delta(output) for output in outputs]))
            self._finish_calls()
            self._report()

    def _receive(self) -> None:
        """Takes messages for a while; waits for one if there is nothing else to do."""
        timeout = 0 if self._engine.has_unfinished else 1000 * _REPORT_IDLE_S
        if self._calls:
            timeout = min(timeout, _CALL_POLL_MS)
        until = None
        while self._running and self._socket.poll(int(timeout)):
            self._handle(decode_to_engine(self._socket.recv()))
            timeout, until = 0, until or time.monotonic() + _RECEIVE_S
            if time.monotonic() > until:
                return  # one client's thousand prompts wait for the others' next tokens

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Generate():
                self._add_request(message)
            case Abort():
                for request_id in message.ids:
                    self._engine.abort(request_id)
            case LoadAdapter():
                self._call(message.call, lambda: self._load(message))
            case UnloadAdapter():
                self._call(message.call, lambda: self._engine.unload_adapter(message.name))
            case Stop():
                self._running = False

    def _add_request(self, asked: Generate) -> None:
        for choice, request_id in enumerate(asked.ids):
            try:
                self._engine.add_request(
                    asked.prompt,
                    asked.params.of_choice(choice),
                    adapter=asked.adapter,
                    request_id=request_id,
                    priority=asked.priority,
                )
            except RequestError as error:  # it would refuse the others for the same reason
                self._send(Refused(request_id, str(error), error.param))
                return

    def _load(self, asked: LoadAdapter) -> None:
        self._engine.load_adapter(
            asked.name, asked.path, replace=asked.replace, pinned=asked.pinned
        )

    def _call(self, call: int, function: Callable[[], object]) -> None:
        """Has a thread do what may take long, so that steps go on."""
        from slora_jax import AdapterError, AdapterUnavailable

        def run() -> None:
            error, unavailable = None, False
            try:
                function()
            except AdapterError as refusal:
                error, unavailable = str(refusal), isinstance(refusal, AdapterUnavailable)
            except MemoryError:
                logger.exception("out of memory")
                error = "this machine has no memory left for it: lower --max-cpu-lora-gib"
                unavailable = True
            except Exception as unexpected:
                logger.exception("a call failed")
                error = f"{type(unexpected).__name__}: {unexpected}"
            self._done.put(Done(call, error, unavailable))

        self._calls += 1
        self._threads.submit(run)

    def _finish_calls(self) -> None:
        while not self._done.empty():
            self._calls -= 1
            self._send(self._done.get())

    def _report(self) -> None:
        now = time.monotonic()
        period = _REPORT_BUSY_S if self._engine.has_unfinished or self._calls else 0.0
        if now - self._reported >= period:
            self._reported = now
            self._send(Report(self._engine.stats()))

    def _send_prompt_logprobs(self, output: RequestOutput) -> None:
        """In parts before the first token: the front end takes in each of them in a moment."""
        if output.prompt_logprobs is None or not _is_first(output):
            return
        for start in range(0, len(output.prompt_logprobs), _PROMPT_PART):
            part = output.prompt_logprobs[start : start + _PROMPT_PART]
            positions = [None if one is None else dict(one) for one in part]
            self._send(PromptLogprobs(output.request_id, positions))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


def _delta(output: RequestOutput) -> Delta:
    count = len(output.new_token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = [dict(position) for position in output.logprobs[len(output.logprobs) - count :]]
    return Delta(
        output.request_id,
        output.new_token_ids,
        output.new_text,
        output.finish_reason,
        output.stop_reason,
        logprobs,
        output.queue_seconds if _is_first(output) else None,
    )


def _is_first(output: RequestOutput) -> bool:
    """Whether nothing of the request had come before."""
    return len(output.token_ids) == len(output.new_token_ids)


def main() -> int:
    """Makes an engine as standard input says, and serves; 2 if it could not be made."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_die_with_the_front_end, daemon=True).start()
    _log_to_stderr(logging.WARNING if launch.quiet else logging.INFO)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.linger = _LINGER_MS
    socket.set_hwm(0)  # a step never waits for the front end
    socket.connect(launch.address)
    try:
        engine, failed = _make_engine(launch)
    except (ValueError, OSError, ClusterError) as error:
        socket.send(encode(Failed(str(error))))
        socket.close()
        return 2
    socket.send(encode(_ready(engine, failed)))
    try:
        EngineProcess(engine, socket).run()
    except Exception as error:
        logger.exception("the engine failed")
        socket.send(encode(Failed(f"{type(error).__name__}: {error}")))
        return 1
    finally:
        socket.close()
    return 0


def _make_engine(launch: Launch) -> tuple["Engine", dict[str, str]]:
    """The engine, and after a restart the adapters that could not be loaded again.

    Raises:
        ValueError: the model, an option or, the first time, an adapter is not supported.
        ClusterError: another process of the engine is missing.
    """
    peers = ALONE if launch.cluster is None else launch.cluster.join()
    from slora_jax import AdapterError, Engine

    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in launch.options.items()
    }
    engine = Engine(launch.model, peers=peers, progress=launch.progress, **options)
    failed: dict[str, str] = {}
    if launch.restart:
        for name, path in launch.adapters.items():
            try:
                engine.load_adapter(name, path)
            except AdapterError as error:
                failed[name] = str(error)
    else:
        engine.load_adapters(launch.adapters, progress=launch.progress)
    engine.warm_up(progress=launch.progress)
    for name in launch.pinned:  # afterwards: the warm-up needs the room
        if name not in failed:
            try:
                engine.pin_adapter(name)
            except AdapterError as error:  # it may have grown meanwhile
                logger.warning("the adapter %r can't be pinned again: %s", name, error)
    return engine, failed


def _ready(engine: "Engine", failed: dict[str, str]) -> Ready:
    import jax

    assert engine.options.max_model_len is not None
    usage = engine.pool_usage()
    return Ready(
        max_model_len=engine.options.max_model_len,
        max_num_seqs=engine.options.max_num_seqs,
        vocab_size=engine.config.vocab_size,
        page_size=engine.options.page_size,
        num_pages=usage["pages"],
        page_bytes=usage["page_bytes"],
        max_loras=engine.options.max_loras,
        device=jax.devices()[0].device_kind,
        failed=failed,
    )


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s engine: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("slora_jax")
    root.addHandler(handler)
    root.setLevel(level)


def _die_with_the_front_end() -> None:
    """Ends this process, whatever it is doing, when the pipe that it was started with closes."""
    while os.read(sys.stdin.fileno(), 1):  # not through `sys.stdin`: at its end Python would
        pass  # wait for this thread to let go of it
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
