# SPDX-License-Identifier: Apache-2.0
"""Brings adapters from the disk to host memory, and on to the device, while steps run.

Copies go to staging: memory of the device beside the pool. From there an adapter is written into
its pages between two steps: 64 MiB in 0.07 ms on an H100. S-LoRA (section 5.2) copied into the pool
itself, without waiting for steps that used it.
"""

import concurrent.futures
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.host_cache import HostCache
from slora_jax.adapters.store import AdapterStore, AdapterVersion

_POLL_S = 50e-6
_REMEMBERED = 4096  # load times, if nobody takes them
_DISK_COST = 10.0  # bringing a page back from the disk, in copies of a page from host memory


class Staged(Protocol):
    """An adapter on its way to the device, or there."""

    def is_ready(self) -> bool:
        """Whether it is there; raises AdapterError if it will never be."""
        ...

    def wait(self) -> None:
        """Returns when it is there; raises AdapterError if it will never be."""
        ...


@dataclass(slots=True)
class _Copy[S: Staged]:
    staged: S
    ready: bool = False


class AdapterLoader[S: Staged]:
    """What is wanted soon, on its way from level to level.

    Args:
        store: the versions of all adapters.
        host: those in host memory.
        read: reads an adapter from its directory; runs in other threads.
        copy: starts the copy of an adapter to the device, and does not wait for it.
        capacity: pages that staging may hold; at least those of the largest adapter.
    """

    def __init__(
        self,
        store: AdapterStore,
        host: HostCache,
        read: Callable[[Path], Any],
        copy: Callable[[Any], S],
        capacity: int,
    ):
        self._store = store
        self._host = host
        self._read = read
        self._copy = copy
        self._capacity = capacity
        self._copies: dict[str, _Copy[S]] = {}
        self._taken: dict[str, S] = {}  # the scheduler counts on these
        self._failed: dict[str, Exception] = {}
        self._wanted_since: dict[str, float] = {}  # of those that are not ready
        self._load_seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.num_copies = 0

    # For the scheduler

    def is_ready(self, adapter_id: str) -> bool:
        copy = self._copies.get(adapter_id)
        if copy is not None and not copy.ready:
            try:
                copy.ready = copy.staged.is_ready()
            except AdapterError as error:  # of another process of the engine
                self._failed[adapter_id] = error
                del self._copies[adapter_id]
                return False
            if copy.ready and adapter_id in self._wanted_since:
                waited = time.monotonic() - self._wanted_since.pop(adapter_id)
                self._load_seconds.append(waited)
        return copy is not None and copy.ready

    def want(self, adapter_ids: Sequence[str]) -> None:
        """Copies, or reads, as many of these as staging holds, and drops what is not among them."""
        if not adapter_ids and not self._copies and not self._wanted_since:
            return
        wanted, pages = [], 0
        for adapter_id in adapter_ids:
            version = self._store.version(adapter_id)
            pages += version.num_pages
            if pages > self._capacity:
                break
            wanted.append(version)
        ids = {version.id for version in wanted}
        self._copies = {name: copy for name, copy in self._copies.items() if name in ids}
        now = time.monotonic()
        self._wanted_since = {
            one: self._wanted_since.get(one, now) for one in ids if not self.is_ready(one)
        }
        # First what host memory has: a read may take its place there.
        for version in [version for version in wanted if not self._copy_from_host(version)]:
            if not self._fetch(version):
                break  # nobody goes past it, or it might never find room

    def take(self, adapter_id: str) -> None:
        self._taken[adapter_id] = self._copies.pop(adapter_id).staged

    def reload_cost(self, adapter_id: str) -> float:
        pages = self._store.version(adapter_id).num_pages
        return pages if adapter_id in self._host else _DISK_COST * pages

    # For the runner

    def taken(self, adapter_id: str) -> S:
        """A ready one that the scheduler has taken, once."""
        return self._taken.pop(adapter_id)

    # For the engine

    def take_load_seconds(self) -> list[float]:
        """Times from when an adapter was wanted until it was ready, since the last call."""
        taken = list(self._load_seconds)
        self._load_seconds.clear()
        return taken

    def put(self, adapter_id: str, staged: S) -> None:
        """Takes a copy that somebody else has started."""
        self._copies[adapter_id] = _Copy(staged)

    @property
    def is_reading(self) -> bool:
        return bool(self._host.reads)

    @property
    def has_copies(self) -> bool:
        """Whether staging holds anything."""
        return bool(self._copies)

    @property
    def has_failures(self) -> bool:
        """Whether `poll` has bad news."""
        return bool(self._failed)

    def poll(self) -> dict[str, Exception]:
        """Takes in what has been read; returns what could not be brought, and why."""
        failed, self._failed = self._failed, {}
        return failed | self._host.poll()

    def discard(self, adapter_id: str) -> None:
        """Forgets a copy."""
        self._copies.pop(adapter_id, None)

    def drop(self, adapter_id: str) -> None:
        """Forgets a version on all its ways."""
        self._copies.pop(adapter_id, None)
        self._failed.pop(adapter_id, None)
        self._host.drop(adapter_id)

    def wait_for_copies(self, timeout: float) -> None:
        """Waits until the copies under way are done, at most so many seconds."""
        until = time.monotonic() + timeout
        while not all(map(self.is_ready, tuple(self._copies))) and time.monotonic() < until:
            time.sleep(_POLL_S)

    def wait_for_reads(self, timeout: float) -> None:
        """Waits until one of the reads under way is done, at most so many seconds."""
        concurrent.futures.wait(self._host.reads, timeout, concurrent.futures.FIRST_COMPLETED)

    def read(self, paths: Sequence[Path], adapter_id: str) -> Any:
        """Reads a version from the first directory that still has it. May be called by any thread.

        Raises:
            AdapterError: none has, or cannot be read.
        """
        errors: list[AdapterError] = []
        for path in paths:
            try:
                adapter = self._read(path)
            except AdapterError as error:
                errors.append(error)
                continue
            if adapter.id == adapter_id:
                return adapter
            errors.append(
                AdapterError(
                    f"{path}: the files have changed since they were loaded. Load the adapter "
                    "again, in place of the old one"
                )
            )
        raise errors[0]

    def _copy_from_host(self, version: AdapterVersion) -> bool:
        """Starts a copy to the device, if host memory has the version; False if it has not."""
        if version.id in self._copies or version.id in self._failed:
            return True
        adapter = self._host.get(version.id)
        if adapter is None:
            return False
        try:
            staged = self._copy(adapter)
        except RuntimeError as error:  # out of the device's memory: nothing was changed
            self._failed[version.id] = error
            return True
        self._copies[version.id] = _Copy(staged)
        self.num_copies += 1
        return True

    def _fetch(self, version: AdapterVersion) -> bool:
        paths = self._store.paths_of(version)
        return self._host.fetch(version.id, version.nbytes, lambda: self.read(paths, version.id))
