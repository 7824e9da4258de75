# SPDX-License-Identifier: Apache-2.0
"""The processes of an engine beside the first one: they do what that one says, see `leading.py`."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from slora_jax.adapters.errors import AdapterError, AdapterUnavailable
from slora_jax.adapters.reader import AdapterReader, HostAdapter
from slora_jax.adapters.reads import Reads
from slora_jax.cluster import ClusterError, Peers
from slora_jax.config import EngineConfig
from slora_jax.engine.command import StepCommand
from slora_jax.engine.link import (
    Command,
    Drop,
    End,
    Enter,
    Failed,
    Read,
    Reply,
    Stage,
    decode_command,
    describe,
    encode,
)
from slora_jax.engine.runner import ModelRunner, StagedAdapter
from slora_jax.engine.sizing import host_bytes
from slora_jax.engine.start import adapter_reader, load_model

_COPIES = 32  # at a time: threads that wait for the device or for those that read

logger = logging.getLogger(__name__)


class Follower:
    """Every other process of an engine.

    Args:
        model: as of `Engine`.
        peers: the other processes, as `Cluster.join` gave them.
        progress: draw a bar on stderr while weights are loaded.
        **options: as of `Engine`; the same on all processes.

    Raises:
        ValueError: as of `Engine`.
        ClusterError: process 0 is gone.
    """

    def __init__(self, model: str | Path, *, peers: Peers, progress: bool = False, **options: Any):
        if peers.process_id == 0:
            raise ValueError("process 0 leads: make an Engine there")
        model_dir = Path(model)
        peers.together(lambda: None, lambda _: {})  # process 0 reads the tokenizer
        weights, setup = load_model(model_dir, EngineConfig(**options), peers, progress=progress)
        self._runner = ModelRunner(weights, setup)
        self._reader: AdapterReader = adapter_reader(setup, model_dir)
        self._reads = Reads(
            "reads", setup.options.lora_load_threads, setup.options.lora_load_timeout_s
        )
        self._copying = ThreadPoolExecutor(_COPIES, "copies")  # no copy waits for the disk
        self._host = _Host(setup.options.max_cpu_loras, host_bytes(setup.options))
        self._copies: dict[int, Future[StagedAdapter]] = {}
        self._channel = peers.channels[0]

    def run(self) -> None:
        """Does what process 0 does, until that closes its engine.

        A failure ends this process on the spot: otherwise JAX would wait at its end for process 0,
        which may be waiting in a step for this one.

        Raises:
            ClusterError: process 0 is gone without a word.
        """
        try:
            for command in self._commands():
                if isinstance(command, End):
                    return
                self._follow(command)
        except ClusterError:
            raise
        except BaseException as error:
            logger.exception("this process of the engine has failed")
            self._say(Failed(describe(error)))
            os._exit(1)

    def _follow(self, command: Command) -> None:
        match command:
            case StepCommand():
                self._runner.execute(command)
            case Enter(install, number):
                # It is there: process 0 has waited for it.
                self._runner.install(install, self._copies.pop(number).result())
            case Stage():
                self._copies[command.number] = self._copying.submit(self._stage, command)
            case Drop(numbers):
                for number in numbers:
                    self._copies.pop(number, None)
            case Read():
                read = self._reads.submit(self._read, command.path)
                read.add_done_callback(partial(self._tell_of, command))

    def _commands(self) -> Iterator[Command]:
        while True:
            yield decode_command(self._channel.receive())

    def _read(self, path: str) -> str:
        adapter = self._reader.read(path)
        self._host.put(adapter)
        return adapter.id

    def _tell_of(self, command: Read, read: Future[str]) -> None:
        with suppress(Exception):  # the reply says it
            self._replying(command.number, read.result, lambda adapter_id: adapter_id)

    def _stage(self, command: Stage) -> StagedAdapter:
        def stage() -> StagedAdapter:
            adapter = self._host.get(command.adapter_id)
            if adapter is None:  # forgotten here, not yet there
                adapter = self._reads.submit(self._reader.read, command.path).result()
                if adapter.id != command.adapter_id:
                    raise AdapterError(f"{command.path}: the files have changed")
                self._host.put(adapter)
            staged = self._runner.stage(adapter)
            staged.wait()
            return staged

        return self._replying(command.number, stage, lambda _: command.adapter_id)

    def _replying[T](self, number: int, act: Callable[[], T], found: Callable[[T], str]) -> T:
        """Does something, and tells process 0 what came of it."""
        try:
            result = act()
        except Exception as problem:
            unavailable = isinstance(problem, AdapterUnavailable)
            self._say(Reply(number, None, describe(problem), unavailable))
            raise
        self._say(Reply(number, found(result), None))
        return result

    def _say(self, what: Reply | Failed) -> None:
        with suppress(ClusterError):  # who reads commands will notice
            self._channel.send(encode(what))


class _Host:
    """Adapters in this process's memory, the least recently used one dropped first.

    Process 0 may still count on what is dropped here: it is read again then.
    """

    def __init__(self, max_adapters: int | None, max_bytes: int):
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def get(self, adapter_id: str) -> HostAdapter | None:
        with self._lock:
            if adapter_id in self._adapters:
                self._adapters.move_to_end(adapter_id)
            return self._adapters.get(adapter_id)

    def put(self, adapter: HostAdapter) -> None:
        with self._lock:
            if adapter.id not in self._adapters:
                self._nbytes += adapter.nbytes
            self._adapters[adapter.id] = adapter
            self._adapters.move_to_end(adapter.id)
            while len(self._adapters) > 1 and self._is_too_full():
                _, dropped = self._adapters.popitem(last=False)
                self._nbytes -= dropped.nbytes

    def _is_too_full(self) -> bool:
        too_many = self._max_adapters is not None and len(self._adapters) > self._max_adapters
        return too_many or self._nbytes > self._max_bytes
