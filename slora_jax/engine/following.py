# SPDX-License-Identifier: Apache-2.0
"""One engine, several processes: the first one plans, the others carry out the same commands.

Process 0 has the scheduler, the requests and the names of the adapters. Whatever it is about to
have its devices do it tells the others first, over a TCP connection each; they do the same on
theirs, in the same order, so that collectives meet. Each process reads adapters from its own disk
and keeps its own devices' parts: their directories must be the same on all hosts.

Messages are pickled. The connections are authenticated with a key that process 0 draws and hands
out over JAX's own cluster, and there is no other way in.
"""

import atexit
import os
import pickle
import secrets
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import jax
import numpy as np
from jax.experimental import multihost_utils

from slora_jax.adapters.peft import AdapterError
from slora_jax.adapters.reader import AdapterReader, HostAdapter
from slora_jax.config import EngineConfig
from slora_jax.core import Install
from slora_jax.engine.command import StepCommand
from slora_jax.engine.runner import ModelRunner, StagedAdapter, StepResult
from slora_jax.engine.setup import Setup
from slora_jax.engine.sizing import host_bytes
from slora_jax.engine.start import adapter_reader, load_model
from slora_jax.model.weights import LlamaWeights

_KEY_BYTES = 32
_GREETING_BYTES = 4096


class Read(NamedTuple):
    """Read an adapter's directory and say what is there; the only command with a reply."""

    number: int
    path: Path


class Reply(NamedTuple):
    """What a process found: an adapter's id, or what is wrong."""

    number: int
    adapter_id: str | None
    error: str | None


class Stage(NamedTuple):
    """Start the copy of an adapter to the devices."""

    number: int
    adapter_id: str
    path: Path


class Drop(NamedTuple):
    """Copies that nobody wants any more."""

    numbers: tuple[int, ...]


class Enter(NamedTuple):
    """Write a copy into its pages."""

    install: Install
    number: int


class End(NamedTuple):
    """Nothing comes after this."""


type Command = Read | Stage | Drop | Enter | StepCommand | End


class FollowerError(RuntimeError):
    """Another process of the engine is gone, and with it its part of the model."""


class Followers:
    """Process 0's connections to the others. Its methods may be called by any thread."""

    def __init__(self) -> None:
        key = secrets.token_bytes(_KEY_BYTES)
        with Listener(("", 0), backlog=jax.process_count(), authkey=key) as listener:
            _greet(pickle.dumps((_own_addresses(), listener.address[1], key)))
            self._connections: list[Connection] = []
            while len(self._connections) < jax.process_count() - 1:
                with suppress(AuthenticationError, EOFError, OSError):  # somebody else knocked
                    self._connections.append(_prompt(listener.accept()))
        self._lock = threading.Lock()
        self._numbers = 0
        self._dropped: deque[int] = deque()
        self._lost: str | None = None
        self._waiting: dict[int, list[Reply]] = {}
        self._answered = threading.Condition()
        for connection in self._connections:
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()
        # Later than JAX's own, so earlier at the end: JAX waits there for all to leave.
        atexit.register(self.close)

    def close(self) -> None:
        """Sends the others home."""
        atexit.unregister(self.close)
        with suppress(FollowerError):
            self.send(End())
        with self._lock:
            self._lost = self._lost or "the engine was closed"

    def send(self, command: Command) -> None:
        """Tells all others what is about to be done here.

        Raises:
            FollowerError: one of them is gone.
        """
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.popleft())
        with self._lock:
            if dropped:
                self._send(Drop(tuple(dropped)))
            self._send(command)

    def _send(self, command: Command) -> None:
        if self._lost is not None:
            raise FollowerError(self._lost)
        data = pickle.dumps(command)
        try:
            for connection in self._connections:
                connection.send_bytes(data)
        except OSError as error:
            self._lost = f"a process of the engine is gone: {error}"
            raise FollowerError(self._lost) from error

    def number(self) -> int:
        """A number that nothing else has."""
        with self._lock:
            self._numbers += 1
            return self._numbers

    def drop(self, number: int) -> None:
        """Lets the others forget a copy, with the next command. Safe in a finalizer."""
        self._dropped.append(number)

    def reading(self, read: Callable[..., HostAdapter]) -> Callable[..., HostAdapter]:
        """`AdapterReader.read` of all processes, from this one's."""

        def read_everywhere(path: str | Path, name: str | None = None) -> HostAdapter:
            path = Path(os.path.abspath(path))
            return self._read(path, lambda: read(path, name))

        return read_everywhere

    def _read(self, path: Path, own: Callable[[], HostAdapter]) -> HostAdapter:
        """Has all processes read a directory, at the same time, and compares what they found.

        Raises:
            AdapterError: one of them refuses it, or finds something else there.
        """
        number = self.number()
        with self._answered:
            self._waiting[number] = []
        try:
            self.send(Read(number, path))
            adapter = own()
            with self._answered:
                self._answered.wait_for(
                    lambda: self._lost or len(self._waiting[number]) == len(self._connections)
                )
                replies = self._waiting[number]
        finally:
            with self._answered:
                del self._waiting[number]
        if self._lost is not None:
            raise FollowerError(self._lost)
        for reply in replies:
            if reply.error is not None:
                raise AdapterError(f"another process of the engine refuses it: {reply.error}")
            if reply.adapter_id != adapter.id:
                raise AdapterError(
                    f"{path}: another process of the engine finds other files there. Adapters' "
                    "directories must be the same on all hosts"
                )
        return adapter

    def _listen(self, connection: Connection) -> None:
        """Takes in replies until the other end is gone."""
        try:
            while True:
                reply = pickle.loads(connection.recv_bytes())
                with self._answered:
                    if reply.number in self._waiting:
                        self._waiting[reply.number].append(reply)
                    self._answered.notify_all()
        except (OSError, EOFError):
            with self._answered:
                self._lost = self._lost or "a process of the engine is gone: see its own messages"
                self._answered.notify_all()


class LeadingRunner(ModelRunner):
    """Process 0's `ModelRunner`: has the others do what it does."""

    def __init__(self, weights: LlamaWeights, setup: Setup, followers: Followers):
        super().__init__(weights, setup)
        self._followers = followers
        self._copies: dict[int, int] = {}  # numbers of copies, by the ids of their objects

    def execute(self, command: StepCommand) -> StepResult:
        self._followers.send(command)
        return super().execute(command)

    def stage(self, adapter: HostAdapter) -> StagedAdapter:
        number = self._followers.number()
        self._followers.send(Stage(number, adapter.id, adapter.path))
        staged = super().stage(adapter)
        self._copies[id(staged)] = number
        finalize(staged, self._forget, id(staged))
        return staged

    def install(self, install: Install, staged: StagedAdapter) -> None:
        self._followers.send(Enter(install, self._copies[id(staged)]))
        super().install(install, staged)

    def _forget(self, copy: int) -> None:
        self._followers.drop(self._copies.pop(copy))


class Follower:
    """Every other process of an engine.

    Args:
        model: as of `Engine`.
        progress: draw a bar on stderr while weights are loaded.
        **options: as of `Engine`; the same on all processes.

    Raises:
        ValueError: as of `Engine`.
    """

    def __init__(self, model: str | Path, *, progress: bool = False, **options: Any):
        if jax.process_index() == 0:
            raise ValueError("process 0 leads: make an Engine there")
        model_dir = Path(model)
        weights, setup = load_model(model_dir, EngineConfig(**options), progress=progress)
        self._runner = ModelRunner(weights, setup)
        self._reader: AdapterReader = adapter_reader(setup, model_dir)
        self._threads = ThreadPoolExecutor(setup.options.lora_load_threads, "adapters")
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._most_bytes = host_bytes(setup.options)
        self._copies: dict[int, Future[StagedAdapter]] = {}
        self._lock = threading.Lock()
        self._connection = _connect(*pickle.loads(_greet(b"")))

    def run(self) -> None:
        """Does what process 0 does, until that closes its engine.

        Raises:
            FollowerError: process 0 is gone without a word.
        """
        for command in self._commands():
            match command:
                case StepCommand():
                    self._runner.execute(command)
                case Enter(install, number):
                    # Rarely waits: process 0 has its own copy already.
                    self._runner.install(install, self._copies.pop(number).result())
                case Stage(number, adapter_id, path):
                    self._copies[number] = self._threads.submit(self._stage, adapter_id, path)
                case Drop(numbers):
                    for number in numbers:
                        self._copies.pop(number, None)
                case Read():
                    self._threads.submit(self._read, command)
                case End():
                    return

    def _commands(self) -> Iterator[Command]:
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise FollowerError("process 0 of the engine is gone") from error
            yield pickle.loads(data)

    def _read(self, command: Read) -> None:
        adapter_id = error = None
        try:
            adapter = self._reader.read(command.path)
            adapter_id = adapter.id
            self._keep(adapter)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        reply = pickle.dumps(Reply(command.number, adapter_id, error))
        with self._lock, suppress(OSError):
            self._connection.send_bytes(reply)

    def _stage(self, adapter_id: str, path: Path) -> StagedAdapter:
        with self._lock:
            adapter = self._adapters.get(adapter_id)
            if adapter is not None:
                self._adapters.move_to_end(adapter_id)
        if adapter is None:  # forgotten here, not yet there
            adapter = self._reader.read(path)
            if adapter.id != adapter_id:
                raise AdapterError(f"{path}: the files have changed since they were loaded")
            self._keep(adapter)
        return self._runner.stage(adapter)

    def _keep(self, adapter: HostAdapter) -> None:
        """Keeps an adapter in host memory, and as few others as need be go."""
        with self._lock:
            self._adapters[adapter.id] = adapter
            self._adapters.move_to_end(adapter.id)
            while sum(one.nbytes for one in self._adapters.values()) > self._most_bytes:
                if len(self._adapters) == 1:
                    break
                self._adapters.popitem(last=False)


def _greet(data: bytes) -> bytes:
    """Process 0's bytes, to all processes, over JAX's cluster."""
    if len(data) > _GREETING_BYTES:
        raise ValueError(f"{len(data)} bytes are too long for a greeting")
    padded = np.zeros(_GREETING_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def _prompt(connection: Connection) -> Connection:
    """A connection that sends at once: no step's command waits for the last one's receipt."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _own_addresses() -> list[str]:
    """Addresses under which other hosts may find this one, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it says which interface would be used
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [info[4][0] for info in socket.getaddrinfo(socket.getfqdn(), None, socket.AF_INET)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _connect(addresses: list[str], port: int, key: bytes) -> Connection:
    errors = []
    for address in addresses:
        try:
            return _prompt(Client((address, port), authkey=key))
        except Exception as error:  # somebody else may listen there
            errors.append(f"{address}: {error}")
    raise FollowerError(f"process 0 cannot be reached on port {port}: {'; '.join(errors)}")
