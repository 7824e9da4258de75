# SPDX-License-Identifier: Apache-2.0
"""Loads, replaces, pins and unloads adapters while requests for them run."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from slora_jax.adapters.errors import AdapterError, AdapterUnavailable
from slora_jax.adapters.host_cache import HostCache
from slora_jax.adapters.loader import AdapterLoader, Staged
from slora_jax.adapters.peft import CONFIG_FILE, signature_of
from slora_jax.adapters.reader import HostAdapter
from slora_jax.adapters.residency import AdapterCache
from slora_jax.adapters.store import AdapterStore, AdapterVersion
from slora_jax.core import Install, Request
from slora_jax.pool.allocator import PagePool
from slora_jax.stats import AdapterStats

_LOADS = 32  # at a time: threads that wait for those that read


class Device[S: Staged](Protocol):
    """Copies adapters to staging, and from there into their pages."""

    def stage(self, adapter: HostAdapter) -> S:
        """Starts a copy to the device, and does not wait for it."""
        ...

    def expect(self, adapter: HostAdapter) -> None:
        """Prepares for an adapter that has been loaded."""
        ...

    def install(self, install: Install, staged: S) -> None:
        """Writes a ready copy into its pages, before the next step."""
        ...


@dataclass(slots=True)
class Rescan:
    """What a look at a directory of adapters' directories changed, by name.

    Attributes:
        loaded, replaced, unloaded: adapters that appeared, were written anew, or disappeared.
        failed: why an adapter could not be loaded, or not be replaced: then the old one stays.
    """

    loaded: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class AdapterManager[S: Staged]:
    """All adapters of an engine, on disk, in host memory and in the pool.

    `load`, `add`, `load_all`, `rescan`, `pin`, `unpin` and `unload` may be called by any thread.
    They read files and copy without holding the lock, so that no step waits for them. All else is
    called by who holds it.

    Args:
        lock: the engine's.
        read: `AdapterReader.read`.
        device: of the pool.
        pool: the pages.
        num_slots: most adapters in the pool.
        host: those in host memory.
        staging_pages: of the device's memory, for copies.
        requests: gives those in progress.
        page_size: tokens of a KV page.
        reads: threads that call `read`.
    """

    def __init__(
        self,
        lock: RLock,
        read: Callable[..., HostAdapter],
        device: Device[S],
        pool: PagePool,
        *,
        num_slots: int,
        host: HostCache[HostAdapter],
        staging_pages: int,
        requests: Callable[[], Iterable[Request]],
        page_size: int,
        reads: Executor,
    ):
        self._lock = lock
        self._read = read
        self._device = device
        self._pool = pool
        self._requests = requests
        self._page_size = page_size
        self._reads = reads
        self._staging = Lock()  # one pin at a time copies; taken before the engine's lock
        self.host = host
        self.store = AdapterStore(self._free)
        self.loader: AdapterLoader[S] = AdapterLoader(
            self.store, host, read, device.stage, staging_pages
        )
        self.cache = AdapterCache(pool, num_slots, self.pages_of, self.loader)

    # For any thread

    def load(
        self, name: str, path: str | Path, *, replace: bool = False, pinned: bool = False
    ) -> None:
        """See `Engine.load_adapter`."""

        with self._lock:
            self._check_name(name, replace)
        adapter = self._reads.submit(self._read, path, name).result()
        self.add(name, adapter, replace=replace, pinned=pinned)

    def add(
        self, name: str, adapter: HostAdapter, *, replace: bool = False, pinned: bool = False
    ) -> None:
        """The same for an adapter that has been read already."""
        self._check_budget(name, adapter)
        with self._lock:
            version = self.store.adopt(adapter)
        try:
            with self._staging if pinned else nullcontext():
                staged = self._stage(version, adapter) if pinned else None
                with self._lock:
                    self._check_name(name, replace)  # another thread may have been faster
                    if pinned:
                        self._enter(version, staged)
                    before = self.store[name].version if name in self.store else None
                    self.store.bind(name, adapter, pinned=pinned)
                    self._follow_names(before)
                    self._device.expect(adapter)
                    self.host.put(adapter)  # after that: the one before may be kept instead
        finally:
            self._let_go(version)

    def load_all(self, paths: Mapping[str, str | Path], *, progress: bool = False) -> None:
        """See `Engine.load_adapters`."""
        refused = self.load_each(paths, progress=progress)
        if not refused:
            return
        away = all(isinstance(error, AdapterUnavailable) for error in refused.values())
        kind = AdapterUnavailable if away else AdapterError
        lines = (f"the adapter {name!r} is refused: {error}" for name, error in refused.items())
        raise kind("; ".join(lines))

    def load_each(
        self, paths: Mapping[str, str | Path], *, progress: bool = False
    ) -> dict[str, Exception]:
        """See `Engine.load_each_adapter`."""
        return self._load_each(paths, progress=progress)

    def rescan(self, root: str | Path, *, progress: bool = False) -> Rescan:
        """See `Engine.rescan_adapters`."""
        root = Path(os.path.abspath(root))
        if not root.is_dir():
            raise AdapterError(
                f"{root}: no such directory. Give one that holds adapters' directories"
            )
        there = {file.parent.name: file.parent for file in sorted(root.glob(f"*/{CONFIG_FILE}"))}
        with self._lock:
            bound = {name: self.store[name] for name in self.store}
        own = {name: one for name, one in bound.items() if one.path == root / name}
        result = Rescan()
        for name in sorted(own.keys() - there.keys()):
            with self._lock:
                if name in self.store and self.store[name].path == own[name].path:
                    self._unbind(name)
                    result.unloaded.append(name)
        self.store.tell()
        for name in there.keys() & (bound.keys() - own.keys()):
            result.failed[name] = f"the adapter {name!r} has been loaded from {bound[name].path}"
        changed = {
            n: p for n, p in there.items() if n in own and own[n].signature != signature_of(p)
        }
        new = {n: p for n, p in there.items() if n not in bound}
        pinned = {name for name in changed if own[name].pinned}
        failed = self._load_each(
            {**changed, **new}, replace=changed.keys(), pinned=pinned, progress=progress
        )
        result.failed |= {name: str(error) for name, error in failed.items()}
        result.loaded = sorted(new.keys() - failed.keys())
        result.replaced = sorted(changed.keys() - failed.keys())
        return result

    def pin(self, name: str) -> None:
        """See `Engine.pin_adapter`."""
        with self._lock:
            version = self.store.find(name).version
            self.store.hold(version)
        try:
            with self._staging:
                staged = self._stage(version, None)
                with self._lock:
                    if name not in self.store or self.store[name].version is not version:
                        raise AdapterError(
                            f"the adapter {name!r} was replaced or unloaded meanwhile"
                        )
                    self._enter(version, staged)
                    self.store.set_pinned(name, True)
        finally:
            self._let_go(version)

    def unpin(self, name: str) -> None:
        """See `Engine.unpin_adapter`."""
        with self._lock:
            self.store.find(name)
            self.store.set_pinned(name, False)
            self._follow_names(self.store[name].version)

    def unload(self, name: str) -> Future[None]:
        """See `Engine.unload_adapter`."""
        with self._lock:
            gone = self._unbind(name)
        self.store.tell()
        return gone

    # For the engine, which holds the lock

    @property
    def capacity(self) -> int:
        """Pages of the pool."""
        return self._pool.capacity

    def room_for(self, adapter_id: str | None) -> int:
        """Pages that a request may need in all, its adapter's included: others may be pinned."""
        return self._pool.capacity - self.cache.pinned_pages(beside=adapter_id)

    def pages_needed(self, request: Request) -> int:
        """Pages that a request needs in all, its adapter's included."""
        lora = 0 if request.adapter_id is None else self.pages_of(request.adapter_id)
        return request.most_pages(self._page_size) + lora

    def hold(self, request: Request) -> None:
        """Keeps a request's adapter alive until `release`."""
        if request.adapter_id is not None:
            self.store.hold(self.store.version(request.adapter_id))

    def release(self, request: Request) -> None:
        """Takes note that a request has ended, and holds nothing in the pool any more."""
        if request.adapter_id is not None:
            self.store.release(self.store.version(request.adapter_id))

    def pages_of(self, adapter_id: str) -> int:
        """Pages of an adapter, in the pool or not."""
        return self.store.version(adapter_id).num_pages

    def rank_of(self, adapter_id: str) -> int:
        return self.store.version(adapter_id).rank

    def residents(self) -> tuple[AdapterStats, ...]:
        """The adapters in the pool, least recently used first."""
        found = []
        for one, resident in self.cache.residents.items():
            version = self.store.version(one)
            found.append(
                AdapterStats(
                    names=tuple(sorted(version.names)) or (one,),
                    pages=len(resident.pages),
                    rank=version.rank,
                    users=resident.users,
                    pinned=resident.pinned,
                )
            )
        return tuple(found)

    # Inside

    def _free(self, version: AdapterVersion) -> None:
        """Frees what a version has on all levels."""
        if version.id in self.cache:
            self.cache.evict(version.id)
        self.loader.drop(version.id)

    def _check_name(self, name: str, replace: bool) -> None:
        if not replace or not name:
            self.store.check_free(name)

    def _check_budget(self, name: str, adapter: HostAdapter) -> None:
        if adapter.nbytes > self.host.max_bytes:
            raise AdapterError(
                f"the adapter {name!r} takes {adapter.nbytes} bytes of host memory, more than the "
                f"{self.host.max_bytes} that all may take: raise max_cpu_lora_gib"
            )

    def _load_each(
        self,
        paths: Mapping[str, str | Path],
        *,
        replace: Collection[str] = (),
        pinned: Collection[str] = (),
        progress: bool,
    ) -> dict[str, Exception]:
        """Loads adapters, several at a time; returns what could not be, in the order given."""
        failed: dict[str, Exception] = {}
        if not paths:
            return failed
        bar = Progress(console=Console(stderr=True), disable=not progress)
        with bar, ThreadPoolExecutor(_LOADS) as threads:
            reads = {
                threads.submit(
                    self.load, name, path, replace=name in replace, pinned=name in pinned
                ): name
                for name, path in paths.items()
            }
            for read in bar.track(as_completed(reads), len(reads), description="adapters"):
                error = read.exception()
                if isinstance(error, Exception):
                    failed[reads[read]] = error
                elif error is not None:
                    raise error
        return {name: failed[name] for name in paths if name in failed}

    def _follow_names(self, version: AdapterVersion | None) -> None:
        """Does what a version's names ask for, after one was given to it or taken away.

        Once no name of it is pinned, it can be evicted. Once it has no names, its directory may
        hold something else: host memory keeps it for those who still use it.
        """
        if version is None or not self.store.knows(version):
            return
        if version.id in self.cache and not self.store.is_pinned(version):
            self.cache.unpin(version.id)
        self.host.keep(version.id, not version.names)

    def _unbind(self, name: str) -> Future[None]:
        version = self.store.find(name).version
        gone = self.store.unbind(name)
        self._follow_names(version)
        return gone

    def _let_go(self, version: AdapterVersion) -> None:
        """Ends the hold on a version."""
        with self._lock:
            self._follow_names(version)
            self.store.release(version)
        self.store.tell()

    def _stage(self, version: AdapterVersion, adapter: HostAdapter | None) -> S | None:
        """A ready copy of a version that is held, read again if need be; None: it is in the pool.

        Called without the lock.
        """
        with self._lock:
            if version.id in self.cache:
                return None
            found, paths = adapter or self.host.get(version.id), self.store.paths_of(version)
        if found is None:
            found = self._reads.submit(self.loader.read, paths, version.id).result()
        staged = self._device.stage(found)
        staged.wait()
        return staged

    def _enter(self, version: AdapterVersion, staged: S | None) -> None:
        """Brings a version into the pool, to stay there. Called with the lock.

        Raises:
            AdapterError: the pool has no room for it now, or others would have none left.
        """
        self._check_pin(version)
        if version.id not in self.cache:
            if staged is None:
                raise AdapterError("the adapter was evicted while it was being pinned: try again")
            self.loader.put(version.id, staged)
            acquired = self.cache.acquire(version.id)
            if acquired is None:
                self.loader.discard(version.id)
                raise AdapterError(
                    f"the pool has no {version.num_pages} pages for the adapter now: pin it when "
                    "fewer requests run, or raise num_pages"
                )
            self.cache.release(version.id)
            install = acquired[1]
            assert install is not None
            try:
                self._device.install(install, self.loader.taken(version.id))
            except BaseException:
                self.cache.evict(version.id)  # nobody knows what its pages hold
                raise
        self.cache.pin(version.id)

    def _check_pin(self, version: AdapterVersion) -> None:
        """Raises AdapterError if others would have no room with a version pinned."""
        if version.id in self.cache and self.cache.get(version.id).pinned:
            return
        if self.cache.num_pinned + 1 >= self.cache.num_slots:
            raise AdapterError(
                f"{self.cache.num_pinned} adapters are pinned, and one of max_loras "
                f"{self.cache.num_slots} must be left for the others: unpin one, or raise max_loras"
            )
        for request in self._requests():
            room = self.room_for(request.adapter_id)
            room -= version.num_pages if request.adapter_id != version.id else 0
            if self.pages_needed(request) > room:
                raise AdapterError(
                    f"the request {request.id!r} would find no room beside the pinned adapters: "
                    "pin when it has ended, or raise num_pages"
                )

    def check(self) -> None:
        """Raises AssertionError if the books disagree."""
        users: dict[str, int] = {}
        for request in self._requests():
            if request.adapter_id is not None:
                users[request.adapter_id] = users.get(request.adapter_id, 0) + 1
        self.store.check(users)
        self.host.check()
        known = {version.id for version in self.store.versions}
        assert set(self.cache.residents) <= known, "the pool holds an adapter that nobody knows"
        for version in self.store.versions:
            pinned = version.id in self.cache and self.cache.get(version.id).pinned
            assert pinned == self.store.is_pinned(version), "a pinned adapter is not in the pool"
