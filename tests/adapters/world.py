# SPDX-License-Identifier: Apache-2.0
"""A disk, a host and a device for adapters, each as slow as a test wants it."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.host_cache import HostCache
from slora_jax.adapters.manager import AdapterManager
from slora_jax.adapters.residency import AdapterCache
from slora_jax.core import Install, Request
from tests.scheduling.model import Host

PAGE_BYTES = 10


@dataclass(frozen=True)
class FakeAdapter:
    """What an adapter's file holds: its id is its content."""

    id: str
    path: Path
    num_pages: int
    rank: int = 8
    has_outer: bool = False

    @property
    def signature(self) -> tuple:
        return (self.id,)

    @property
    def nbytes(self) -> int:
        return self.num_pages * PAGE_BYTES


class Disk:
    """Adapters by their directories."""

    def __init__(self) -> None:
        self.files: dict[Path, FakeAdapter] = {}

    def write(self, path: str, content: str, pages: int) -> Path:
        self.files[Path(path)] = FakeAdapter(f"{content} of {pages}", Path(path), pages)
        return Path(path)

    def read(self, path: str | Path, name: str | None = None) -> FakeAdapter:
        if Path(path) not in self.files:
            raise AdapterError(f"{path}: no such directory")
        return self.files[Path(path)]


class SlowThreads(Executor):
    """Runs what it is given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, Callable]] = []

    def submit(self, fn, /, *args, **kwargs):
        future: Future = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run_one(self, index: int = 0) -> None:
        future, call = self.waiting.pop(index % len(self.waiting))
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)


class AtOnce(Executor):
    """Runs what it is given in its caller's thread."""

    def submit(self, fn, /, *args, **kwargs):
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class SlowCopy:
    def __init__(self, adapter: FakeAdapter):
        self.adapter = adapter
        self.done = False

    def is_ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.done = True


class AdapterHost(Host):
    """A host whose adapters are files, and come to the device step by step.

    Args:
        staging_pages, max_cpu_loras, max_bytes: of the levels.
        reads: threads that load.
        **options: as of `Host`.
    """

    def __init__(
        self,
        *sizes,
        staging_pages=4,
        max_cpu_loras=None,
        max_bytes=60,
        reads: Executor | None = None,
        **options,
    ):
        self.disk, self.threads, self.reads = Disk(), SlowThreads(), reads or AtOnce()
        self.copies: list[SlowCopy] = []
        self.failed: list[tuple[Request, Exception]] = []
        self._levels = staging_pages, max_cpu_loras, max_bytes
        super().__init__(*sizes, **{"max_overtakes": 4, **options})

    # What the manager knows of the device

    def stage(self, adapter: FakeAdapter) -> SlowCopy:
        copy = SlowCopy(adapter)
        self.copies.append(copy)
        return copy

    def expect(self, adapter: FakeAdapter) -> None:
        pass

    def install(self, install: Install, staged: SlowCopy) -> None:
        assert staged.done, "an install waits for its copy"
        assert staged.adapter.id == install.adapter_id
        self.device.install(install)

    # What `Host` asks

    def pages_of(self, adapter_id: str) -> int:
        return self.manager.store.version(adapter_id).num_pages

    def make_cache(self) -> AdapterCache:
        staging, adapters, most = self._levels
        self.manager = AdapterManager(
            threading.RLock(),
            self.disk.read,
            self,
            self.pool,
            num_slots=self.adapter_slots,
            host=HostCache(adapters, most, self.threads),
            staging_pages=staging,
            requests=lambda: self.scheduler.requests,
            page_size=self.page_size,
            reads=self.reads,
        )
        return self.manager.cache

    def waits_for_adapters(self) -> bool:
        loader = self.manager.loader
        return loader.has_copies or loader.is_reading

    # What the engine does

    def ask(self, name: str | None, prompt: int, max_output: int) -> Request | None:
        """A request for what a name stands for now; None if it has no room beside the pinned."""
        adapter_id = None if name is None else self.manager.store[name].version.id
        request = self.make(prompt, max_output, name, adapter_id)
        if self.manager.pages_needed(request) > self.manager.room_for(adapter_id):
            return None
        self.enter(request)
        self.manager.hold(request)
        return request

    def ended(self, request: Request) -> None:
        self.manager.release(request)

    def step(self):
        for adapter_id, error in self.manager.loader.poll().items():
            if adapter_id in self.cache:
                continue
            for request in [r for r in self.scheduler.waiting if r.adapter_id == adapter_id]:
                self.failed.append((request, error))
                self.abort(request)
        return super().step()

    def run(self, plan):
        for install in plan.installs:
            self.install(install, self.manager.loader.taken(install.adapter_id))
        return super().run(plan)

    def let_all_come(self) -> None:
        """Ends all reads and copies under way."""
        while self.threads.waiting:
            self.threads.run_one()
        for copy in self.copies:
            copy.done = True
        self.copies.clear()

    def check(self) -> None:
        self.manager.store.tell()
        super().check()
        self.manager.check()
        users = Counter(r.adapter_id for r in self.scheduler.requests if r.adapter_id)
        assert {v.id: v.users for v in self.manager.store.versions if v.users} == users
