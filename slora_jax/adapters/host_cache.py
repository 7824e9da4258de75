# SPDX-License-Identifier: Apache-2.0
"""The adapters that host memory holds, within a budget; the others are read from the disk again."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol


class Sized(Protocol):
    """An adapter in host memory, as far as the budget is concerned."""

    @property
    def id(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True)
class _Read:
    """A read under way, whose room is reserved. `wanted` is False once nobody waits for it."""

    future: Future
    nbytes: int
    wanted: bool = True


class HostCache[A: Sized]:
    """Adapters by their ids, the least recently used one dropped first.

    Its reads run in threads of its own; all else is its owner's, one call at a time.

    Args:
        max_adapters: most adapters at once; None: no limit.
        max_bytes: most bytes.
        threads: that read.
    """

    def __init__(self, max_adapters: int | None, max_bytes: int, threads: Executor):
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[str, A] = OrderedDict()  # least recently used first
        self._reads: dict[str, _Read] = {}
        self._kept: set[str] = set()
        self._threads = threads
        self.nbytes = 0  # of the adapters and of the reads under way

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def reads(self) -> list[Future]:
        """Those under way, or done and not taken in yet."""
        return [read.future for read in self._reads.values()]

    def get(self, adapter_id: str) -> A | None:
        """An adapter if it is here, which counts as a use."""
        adapter = self._adapters.get(adapter_id)
        if adapter is not None:
            self._adapters.move_to_end(adapter_id)
        return adapter

    def put(self, adapter: A) -> bool:
        """Keeps an adapter, if the reads under way leave room for it; says whether they do."""
        if adapter.id in self._adapters:
            self._adapters.move_to_end(adapter.id)
            return True
        if not self._make_room(adapter.nbytes):
            return False
        self._adapters[adapter.id] = adapter
        self.nbytes += adapter.nbytes
        return True

    def keep(self, adapter_id: str, kept: bool) -> None:
        """Says whether an adapter is to stay if it is here: nobody else may have it any more.

        It goes all the same when an adapter that is needed now has no room otherwise.
        """
        if kept:
            self._kept.add(adapter_id)
        else:
            self._kept.discard(adapter_id)

    def drop(self, adapter_id: str) -> None:
        """Forgets an adapter, here or still being read, kept or not."""
        self._kept.discard(adapter_id)
        adapter = self._adapters.pop(adapter_id, None)
        if adapter is not None:
            self.nbytes -= adapter.nbytes
        if adapter_id in self._reads:
            self._reads[adapter_id].wanted = False

    def fetch(self, adapter_id: str, nbytes: int, read: Callable[[], A]) -> bool:
        """Starts to read an adapter, unless it is here or under way; False: no room now.

        Args:
            adapter_id: the adapter.
            nbytes: that it takes.
            read: gives it and no other, or raises.
        """
        if adapter_id in self._adapters:
            return True
        if adapter_id in self._reads:
            self._reads[adapter_id].wanted = True
            return True
        if self._make_room(nbytes) or (not self._reads and self._make_room(nbytes, kept=set())):
            self.nbytes += nbytes
            self._reads[adapter_id] = _Read(self._threads.submit(read), nbytes)
            return True
        return False

    def poll(self) -> dict[str, Exception]:
        """Takes in what has been read; returns what could not be, and why."""
        failed: dict[str, Exception] = {}
        for adapter_id, read in [(n, r) for n, r in self._reads.items() if r.future.done()]:
            del self._reads[adapter_id]
            self.nbytes -= read.nbytes
            if not read.wanted or adapter_id in self._adapters:
                continue  # or it has come some other way
            error = read.future.exception()
            if error is None:
                self.put(read.future.result())
            elif isinstance(error, Exception):
                failed[adapter_id] = error
            else:
                raise error
        return failed

    def _make_room(self, nbytes: int, kept: Collection[str] | None = None) -> bool:
        """Drops adapters until another one fits; none if that is in vain."""
        kept = self._kept if kept is None else kept
        most = self._max_adapters
        count, total = len(self._adapters) + len(self._reads), self.nbytes
        dropped = []
        for adapter in self._adapters.values():
            if total + nbytes <= self._max_bytes and (most is None or count < most):
                break
            if adapter.id not in kept:
                dropped.append(adapter.id)
                count, total = count - 1, total - adapter.nbytes
        if total + nbytes > self._max_bytes or (most is not None and count >= most):
            return False
        for adapter_id in dropped:
            self.nbytes -= self._adapters.pop(adapter_id).nbytes
        return True

    def check(self) -> None:
        """Raises AssertionError unless the books agree, and with the budget."""
        held = sum(adapter.nbytes for adapter in self._adapters.values())
        reading = sum(read.nbytes for read in self._reads.values())
        assert self.nbytes == held + reading, "bytes of host memory are lost"
        assert self.nbytes <= self._max_bytes, "more host memory is used than allowed"
        if self._max_adapters is not None:
            assert len(self._adapters) + len(self._reads) <= self._max_adapters
