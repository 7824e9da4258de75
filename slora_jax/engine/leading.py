# SPDX-License-Identifier: Apache-2.0
"""One engine, several processes: the first one plans, the others carry out the same commands.

Process 0 has the scheduler, the requests and the names of the adapters. Whatever it is about to
have its devices do it tells the others first, over a TCP connection each; they do the same on
theirs, in the same order, so that collectives meet. Each process reads adapters from its own disk
and keeps its own devices' parts: their directories must be the same on all hosts.
"""

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from slora_jax.adapters.errors import AdapterError, AdapterUnavailable
from slora_jax.adapters.reader import HostAdapter
from slora_jax.cluster import Channel, ClusterError, Peers
from slora_jax.core import Install
from slora_jax.engine.command import StepCommand
from slora_jax.engine.link import (
    MOST_REPLY_BYTES,
    Command,
    Drop,
    End,
    Enter,
    Failed,
    Read,
    Reply,
    Stage,
    decode_reply,
    encode,
)
from slora_jax.engine.runner import ModelRunner, StagedAdapter, StepResult
from slora_jax.engine.setup import Setup
from slora_jax.model.weights import LlamaWeights

logger = logging.getLogger(__name__)


class Followers:
    """Process 0's connections to the others. Its methods may be called by any thread.

    Args:
        peers: the others, which wait for commands.
    """

    def __init__(self, peers: Peers) -> None:
        self._channels = list(peers.channels.values())
        self._lock = threading.Lock()
        self._numbers = 0
        self._dropped: deque[int] = deque()
        self._lost: str | None = None
        self._waiting: dict[int, list[Reply]] = {}
        self._answered = threading.Condition()
        for channel in self._channels:
            threading.Thread(target=self._listen, args=(channel,), daemon=True).start()
        # Later than JAX's own, so earlier at the end: JAX waits there for all to leave.
        atexit.register(self.close)

    def close(self) -> None:
        """Sends the others home."""
        atexit.unregister(self.close)
        with suppress(ClusterError):
            self.send(End())
        with self._lock:
            self._lost = self._lost or "the engine was closed"

    def check(self) -> None:
        """Raises ClusterError if one of them is gone."""
        if self._lost is not None:
            raise ClusterError(self._lost)

    def send(self, command: Command) -> None:
        """Tells all others what is about to be done here.

        Raises:
            ClusterError: one of them is gone.
        """
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.popleft())
        with self._lock:
            if dropped:
                self._send(Drop(tuple(dropped)))
            self._send(command)

    def _send(self, command: Command) -> None:
        self.check()
        data = encode(command)
        try:
            for channel in self._channels:
                channel.send(data)
        except ClusterError as error:
            self._lost = self._lost or f"a process of the engine is lost: {error}"
            raise ClusterError(self._lost) from error

    def drop(self, number: int) -> None:
        """Lets the others forget a copy, with the next command. Safe in a finalizer."""
        self._dropped.append(number)

    # Commands with replies

    def ask(self, make: Callable[[int], Read | Stage]) -> int:
        """Tells all others something that they will reply to; its number, to be forgotten later.

        Raises:
            ClusterError: one of them is gone.
        """
        with self._answered:
            self._numbers += 1
            number = self._numbers
            self._waiting[number] = []
        try:
            self.send(make(number))
        except ClusterError:
            self.forget(number)
            raise
        return number

    def replies(self, number: int, *, wait: bool) -> list[Reply] | None:
        """What all others replied; None: not all have yet.

        Raises:
            ClusterError: one of them is gone.
        """
        with self._answered:
            if wait:
                self._answered.wait_for(lambda: self._lost or self._are_all_in(number))
            self.check()
            return self._waiting[number] if self._are_all_in(number) else None

    def forget(self, number: int) -> None:
        """Nobody waits for these replies any more. Safe in a finalizer: it waits for nothing."""
        self._waiting.pop(number, None)

    def _are_all_in(self, number: int) -> bool:
        return len(self._waiting[number]) == len(self._channels)

    def _listen(self, channel: Channel) -> None:
        """Takes in replies until the other end is gone."""
        try:
            while True:
                said = decode_reply(channel.receive(MOST_REPLY_BYTES))
                if isinstance(said, Failed):
                    self._lose(f"a process of the engine has failed: {said.error}")
                    return
                with self._answered:
                    if said.number in self._waiting:
                        self._waiting[said.number].append(said)
                    self._answered.notify_all()
        except ClusterError as error:
            self._lose(f"a process of the engine is lost: {error}; see its own messages")

    def _lose(self, why: str) -> None:
        with self._answered:
            if self._lost is None:
                # A step may be waiting for it: this may be all that anybody hears.
                logger.error(why)
                self._lost = why
            self._answered.notify_all()


def reading(followers: Followers, read: Callable[..., HostAdapter]) -> Callable[..., HostAdapter]:
    """`AdapterReader.read` of all processes at the same time, from this one's.

    It raises AdapterError too if another process refuses a directory, or finds something else.
    """

    def read_everywhere(path: str | Path, name: str | None = None) -> HostAdapter:
        path = Path(os.path.abspath(path))
        number = followers.ask(lambda number: Read(number, str(path)))
        try:
            adapter = read(path, name)
            replies = followers.replies(number, wait=True)
        finally:
            followers.forget(number)
        for reply in replies or ():
            if reply.error is not None:
                kind = AdapterUnavailable if reply.unavailable else AdapterError
                raise kind(f"another process of the engine refuses it: {reply.error}")
            if reply.adapter_id != adapter.id:
                raise AdapterError(
                    f"{path}: another process of the engine finds other files there. Adapters' "
                    "directories must be the same on all hosts"
                )
        return adapter

    return read_everywhere


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StagedEverywhere(StagedAdapter):
    """A copy that all processes have on their way.

    Attributes:
        number: of the copy.
        followers: the others.
    """

    number: int
    followers: Followers

    def is_ready(self) -> bool:
        """Whether it is there in all processes.

        Raises:
            AdapterError: one of them could not copy it.
        """
        return StagedAdapter.is_ready(self) and self._check(wait=False)

    def wait(self) -> None:
        """Returns when it is; raises as `is_ready` does."""
        StagedAdapter.wait(self)
        self._check(wait=True)

    def _check(self, *, wait: bool) -> bool:
        replies = self.followers.replies(self.number, wait=wait)
        for reply in replies or ():
            if reply.error is not None:
                raise AdapterError(f"another process of the engine cannot copy it: {reply.error}")
        return replies is not None


class LeadingRunner(ModelRunner):
    """Process 0's `ModelRunner`: has the others do what it does."""

    def __init__(self, weights: LlamaWeights, setup: Setup, followers: Followers):
        super().__init__(weights, setup)
        self._followers = followers

    def execute(self, command: StepCommand) -> StepResult:
        self._followers.send(command)
        return super().execute(command)

    def stage(self, adapter: HostAdapter) -> StagedEverywhere:
        followers = self._followers
        number = followers.ask(lambda number: Stage(number, adapter.id, str(adapter.path)))
        try:
            own = super().stage(adapter)
        except BaseException:
            _forget(followers, number)
            raise
        staged = StagedEverywhere(
            own.chunks, own.tables, own.adapted, own.has_outer, number, followers
        )
        finalize(staged, _forget, followers, number)
        return staged

    def install(self, install: Install, staged: StagedAdapter) -> None:
        assert isinstance(staged, StagedEverywhere)
        self._followers.send(Enter(install, staged.number))
        super().install(install, staged)


def _forget(followers: Followers, number: int) -> None:
    followers.forget(number)
    followers.drop(number)
