# SPDX-License-Identifier: Apache-2.0
"""The front end's side of the engine: starts its process, talks to it, and notices its death."""

import asyncio
import enum
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from server.errors import HttpError, Invalid, NotFound, Unavailable
from server.generation import Generation
from server.messages import (
    Abort,
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
    decode_from_engine,
    encode,
)
from slora_jax.core import SamplingParams
from slora_jax.stats import EngineStats

_SILENCE_S = 120.0  # of a ready engine, after which it counts as hung
_LAST_WORDS_S = 2.0  # in which they arrive after its process has ended
_STOP_S = 10.0  # in which the process is to end when it is told to
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # before a restart, doubled each time it is in vain

logger = logging.getLogger("slora_jax.server")


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class AdapterRefused(Exception):
    """The engine does not load or unload an adapter; the message says why."""


class Listener(Protocol):
    """Who wants to know what happens to requests and to the engine."""

    def delta(self, generation: Generation, index: int, tokens: int, now: float) -> None:
        """A choice got so many tokens, and perhaps its end, which have been added to it."""
        ...

    def report(self, stats: EngineStats) -> None:
        """How the engine is."""
        ...

    def ready(self, ready: Ready) -> None:
        """The engine takes requests from now on."""
        ...


class EngineClient:
    """One engine in a process of its own, started again if asked for.

    Args:
        launch: gives what to start: it may change between starts.
        listener: told of all outputs.
        restart: start the process again when it dies after it had been ready.
        module: that the process runs.
    """

    def __init__(
        self,
        launch: Callable[[str, bool], Launch],
        listener: Listener,
        *,
        restart: bool,
        module: str = "server.engine_process",
    ) -> None:
        self._module = module
        self._launch = launch
        self._listener = listener
        self._restart = restart
        self._ids = itertools.count()
        self._running: dict[str, tuple[Generation, int]] = {}
        self._calls: dict[int, asyncio.Future[Done]] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard = 0.0
        self.state = State.STARTING
        self.failure: str | None = None  # why it is dead
        self.ready: Ready | None = None  # of the engine that runs, or ran last
        self.stats: EngineStats | None = None
        self.num_restarts = 0
        self._was_ready = False  # since the last start

    # Its life

    async def run(self) -> None:
        """Runs the process until it ends for good. Cancelling this ends it.

        Returns normally when the process has died and is not to be started again; `failure` says
        why.
        """
        pause = _FIRST_PAUSE_S
        while True:
            try:
                await self._run_once()
            except Exception as error:  # it could not be started, or is not understood
                logger.exception("the engine's process is lost")
                self._die(f"{type(error).__name__}: {error}")
            if self.ready is None or not self._restart:
                return  # what could not start the first time never will
            if self._was_ready:
                pause = _FIRST_PAUSE_S
            logger.warning("the engine is started again in %.0f s", pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self.num_restarts += 1
            self.state = State.STARTING

    async def _run_once(self) -> None:
        """Starts the process and serves until it dies."""
        self._was_ready = False
        failure = None
        # A socket of the file system in a directory that only this user may enter.
        with tempfile.TemporaryDirectory(prefix="slora-") as directory:
            address = f"ipc://{Path(directory) / 'engine'}"
            self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
            self._socket.linger = 0
            self._socket.set_hwm(0)
            listening = asyncio.create_task(self._listen(self._socket))
            try:
                self._socket.bind(address)
                launch = self._launch(address, self.ready is not None)
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    self._module,
                    stdin=asyncio.subprocess.PIPE,
                    start_new_session=True,  # the front end handles the keyboard's interrupts
                )
                assert self._process.stdin is not None
                self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
                ending = asyncio.create_task(self._process.wait())
                await asyncio.wait({ending, listening}, return_when=asyncio.FIRST_COMPLETED)
                if ending.done() and ending.result() > 0:  # it was not killed: it says why
                    await asyncio.wait({listening}, timeout=_LAST_WORDS_S)
                if listening.done():
                    failure = listening.result()
                else:
                    failure = f"its process ended with exit code {ending.result()}"
            finally:
                listening.cancel()
                self._die(failure)  # at once: a process may take its time to end
                try:
                    await self._end_process()
                finally:
                    self._socket.close()
                    self._socket = None

    async def _listen(self, socket: zmq.asyncio.Socket) -> str:
        """Handles what the engine says; returns its last words."""
        while True:
            message = decode_from_engine(await socket.recv())
            self._heard = time.monotonic()
            if isinstance(message, Failed):
                return message.message
            self._handle(message)
            await asyncio.sleep(0)  # where many have come, others get their turn between them

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                now = time.monotonic()
                for delta in message.deltas:
                    found = self._running.get(delta.id)
                    if found is None:
                        continue  # aborted meanwhile
                    generation, index = found
                    generation.add(index, delta)
                    self._listener.delta(generation, index, len(delta.tokens), now)
                    if delta.finish_reason is not None:
                        del self._running[delta.id]
            case PromptLogprobs():
                if message.id in self._running:
                    generation, index = self._running[message.id]
                    generation.add_prompt_logprobs(index, message.positions)
            case Refused():
                if message.id in self._running:
                    generation, _ = self._running[message.id]
                    kind = NotFound if message.param == "adapter" else Invalid
                    param = "model" if message.param == "adapter" else message.param
                    generation.fail(kind(message.message, param))
                    self.abort(generation)
            case Done():
                future = self._calls.pop(message.call, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case Report():
                self.stats = message.stats
                self._listener.report(message.stats)
            case Ready():
                self.ready, self.state = message, State.READY
                self._was_ready = True
                self._listener.ready(message)

    def _die(self, failure: str | None) -> None:
        """Tells everybody who waits; without a failure, the engine was told to end."""
        self.state, self.failure, self.stats = State.DEAD, failure, None
        if failure is not None:
            logger.error("the engine is dead", extra={"reason": failure})
        for generation, _ in self._running.values():
            generation.fail(self._unavailable())
        self._running.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._unavailable())
        self._calls.clear()

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            if self._was_ready:  # while it loads, it does not listen
                self._send(Stop())
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
        except TimeoutError:
            pass
        finally:  # also when this is cancelled: there is one process at a time
            if process.returncode is None:
                process.kill()
                await _reaped(process)

    # Requests

    @property
    def is_responsive(self) -> bool:
        """Whether it is ready, and has said something lately."""
        return self.state is State.READY and time.monotonic() - self._heard < _SILENCE_S

    @property
    def num_running(self) -> int:
        """Choices that the engine has not finished."""
        return len(self._running)

    def check_ready(self) -> Ready:
        """What the engine is.

        Raises:
            Unavailable: it can't take requests.
        """
        if self.state is not State.READY or self.ready is None:
            raise self._unavailable()
        return self.ready

    def generate(
        self,
        prompts: Sequence[list[int]],
        adapters: Sequence[str | None],
        params: SamplingParams,
        n: int,
        *,
        priority: int,
        arrival: float,
    ) -> Generation:
        """Has the engine work on prompts, the choices of the first one first.

        Args:
            prompts: their token ids.
            adapters: of each prompt.
            params: of each prompt's first choice; see `SamplingParams.of_choice`.
            n: choices of each prompt.
            priority: lower goes first, under the policy "priority".
            arrival: when the request came, on the monotonic clock.

        Raises:
            Unavailable: it can't take requests.
        """
        self.check_ready()
        asked = [
            Generate([f"{next(self._ids):x}" for _ in range(n)], prompt, params, adapter, priority)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        choices = [(name, one) for one in asked for name in one.ids]
        generation = Generation(
            [name for name, _ in choices],
            [one.prompt for _, one in choices],
            [one.adapter for _, one in choices],
            arrival,
        )
        self._running |= {name: (generation, i) for i, (name, _) in enumerate(choices)}
        for one in asked:
            self._send(one)
        return generation

    def abort(self, generation: Generation) -> None:
        """Has the engine forget the choices that are not finished."""
        ids = [name for name in generation.ids if self._running.pop(name, None) is not None]
        if ids and self.state is State.READY:
            self._send(Abort(ids))

    def fail_all(self, error: HttpError) -> None:
        """Ends all requests with an error."""
        for generation in {id(g): g for g, _ in self._running.values()}.values():
            generation.fail(error)
            self.abort(generation)

    # Adapters

    async def load_adapter(self, name: str, path: Path, *, replace: bool, pinned: bool) -> None:
        """Raises AdapterRefused with the reason, or Unavailable.

        The latter if the adapter can't be read now, or the engine dies meanwhile.
        """
        await self._call(lambda call: LoadAdapter(call, name, str(path), replace, pinned))

    async def unload_adapter(self, name: str) -> None:
        """Raises AdapterRefused with the reason, or Unavailable if the engine dies meanwhile."""
        await self._call(lambda call: UnloadAdapter(call, name))

    async def _call(self, message: Callable[[int], ToEngine]) -> None:
        self.check_ready()
        call = next(self._ids)
        future = self._calls[call] = asyncio.get_running_loop().create_future()
        self._send(message(call))
        done = await future
        if done.error is not None and done.unavailable:
            raise Unavailable(done.error, retry_after=5)
        if done.error is not None:
            raise AdapterRefused(done.error)

    def _send(self, message: ToEngine) -> None:
        if self._socket is not None:
            # Without a limit of messages in the socket, sending is done at once.
            self._socket.send(encode(message))

    def _unavailable(self) -> Unavailable:
        if self.state is State.STARTING:
            return Unavailable("the engine is still loading: try again later", retry_after=5)
        if self._restart:
            return Unavailable("the engine died and is being started again", retry_after=10)
        return Unavailable("the engine is dead: the server must be started again")


async def _reaped(process: asyncio.subprocess.Process) -> None:
    """Waits for a process that has been killed. A cancellation waits, too: it is a moment."""
    ending = asyncio.create_task(process.wait())
    cancelled = None
    while not ending.done():
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
