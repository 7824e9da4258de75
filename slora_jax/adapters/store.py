# SPDX-License-Identifier: Apache-2.0
"""Names of adapters, the weights that they stand for, and who still uses these.

A name is bound to a version: weights, identified by a hash of their files' content. Replacing or
unloading an adapter changes what its name stands for, at once and for new requests only; a version
lives on until the last request that was made with it has ended.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from slora_jax.adapters.errors import AdapterError


class Read(Protocol):
    """An adapter that has been read and checked."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def signature(self) -> tuple: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def has_outer(self) -> bool: ...


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """Weights that some name stands for, or stood for when a request was made.

    Attributes:
        id: a hash of their files' content.
        path: the directory that they were read from last.
        rank: the largest of any module.
        num_pages: in the pool.
        nbytes: in host memory.
        has_outer: whether they adapt the embedding or the head.
        names: that stand for it.
        users: requests in progress, and others who need it for a moment.
        gone: callers of `unbind` who want to know when it is freed.
    """

    id: str
    path: Path
    rank: int
    num_pages: int
    nbytes: int
    has_outer: bool
    names: set[str] = field(default_factory=set)
    users: int = 0
    gone: list[Future[None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Binding:
    """What a name stands for.

    Attributes:
        version: the weights.
        path: the directory that they were loaded from under this name.
        signature: of the directory's files at that time.
        pinned: whether they are to stay in the pool.
    """

    version: AdapterVersion
    path: Path
    signature: tuple
    pinned: bool


class AdapterStore:
    """The adapters that can be asked for.

    Args:
        free: is told of a version that nobody needs any more.
    """

    def __init__(self, free: Callable[[AdapterVersion], None]):
        self._free = free
        self._names: dict[str, Binding] = {}
        self._versions: dict[str, AdapterVersion] = {}
        self._told: list[Future[None]] = []

    # Names

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Binding:
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def known(self) -> str:
        """The adapters' names, for messages."""
        names = sorted(self)
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"loaded are {shown}" if names else "none is loaded"

    def find(self, name: str) -> Binding:
        """What a name stands for.

        Raises:
            AdapterError: nothing.
        """
        if name not in self._names:
            raise AdapterError(f"the adapter {name!r} cannot be found: {self.known()}")
        return self._names[name]

    def check_free(self, name: str) -> None:
        """Raises AdapterError if a name can't be given to an adapter."""
        if not name:
            raise AdapterError("an adapter's name must not be empty")
        if name in self._names:
            raise AdapterError(
                f"the adapter {name!r} has already been loaded from {self._names[name].path}: "
                "unload it first, or load this one in its place"
            )

    def bind(self, name: str, adapter: Read, *, pinned: bool = False) -> None:
        """Lets a name stand for a version that is held; what it stood for before may be freed."""
        version = self._versions[adapter.id]
        before = self._names.get(name)
        version.names.add(name)
        self._names[name] = Binding(version, adapter.path, adapter.signature, pinned)
        if before is not None and before.version is not version:
            before.version.names.discard(name)
            self._settle(before.version)
        self._tell(version)

    def unbind(self, name: str) -> Future[None]:
        """Takes a name away.

        Returns:
            Done when no request uses its version any more and it has been freed, or when another
            name keeps it alive.
        """
        version = self.find(name).version
        del self._names[name]
        version.names.discard(name)
        gone: Future[None] = Future()
        gone.set_running_or_notify_cancel()  # freeing can't be cancelled
        if version.names:
            self._told.append(gone)
        else:
            version.gone.append(gone)
            self._settle(version)
        return gone

    def set_pinned(self, name: str, pinned: bool) -> None:
        self._names[name] = replace(self._names[name], pinned=pinned)

    def is_pinned(self, version: AdapterVersion) -> bool:
        """Whether some name wants it to stay in the pool."""
        return any(self._names[name].pinned for name in version.names)

    # Versions

    @property
    def versions(self) -> list[AdapterVersion]:
        """All that have a name or a user."""
        return list(self._versions.values())

    def knows(self, version: AdapterVersion) -> bool:
        """Whether a version has not been freed."""
        return self._versions.get(version.id) is version

    def version(self, adapter_id: str) -> AdapterVersion:
        return self._versions[adapter_id]

    def paths_of(self, version: AdapterVersion) -> list[Path]:
        """Directories to read it from again: those that its names were loaded from, then the last.

        Any of them may hold something else by now.
        """
        named = (self._names[name].path for name in sorted(version.names))
        return list(dict.fromkeys([*named, version.path]))

    def adopt(self, adapter: Read) -> AdapterVersion:
        """The version of what was read, held as by a request: `release` it."""
        version = self._versions.get(adapter.id)
        if version is None:
            known = adapter.rank, adapter.num_pages, adapter.nbytes, adapter.has_outer
            version = AdapterVersion(adapter.id, adapter.path, *known)
            self._versions[adapter.id] = version
        version.path = adapter.path
        version.users += 1
        return version

    def hold(self, version: AdapterVersion) -> None:
        version.users += 1

    def release(self, version: AdapterVersion) -> None:
        if version.users == 0:
            raise RuntimeError(f"adapter {version.id} is released but has no user")
        version.users -= 1
        self._settle(version)

    def _settle(self, version: AdapterVersion) -> None:
        """Frees a version that has neither names nor users."""
        if not version.names and not version.users:
            del self._versions[version.id]
            self._free(version)
            self._tell(version)

    def _tell(self, version: AdapterVersion) -> None:
        """Those who wait for its end need wait no longer."""
        self._told += version.gone
        version.gone = []

    def tell(self) -> None:
        """Resolves the futures of what has been freed since the last time.

        To be called without a lock: their callbacks may do anything.
        """
        while self._told:
            self._told.pop(0).set_result(None)

    def check(self, users: dict[str, int]) -> None:
        """Raises AssertionError unless names and versions agree, and users with the caller's."""
        for name, binding in self._names.items():
            assert self._versions[binding.version.id] is binding.version, "a name without a version"
            assert name in binding.version.names
        for version in self._versions.values():
            assert version.names or version.users, f"adapter {version.id} was not freed"
            assert all(self._names[name].version is version for name in version.names)
            assert not (version.names and version.gone), "somebody waits for what is in use again"
        found = {v.id: v.users for v in self._versions.values() if v.users}
        assert found == users, "the users of an adapter are miscounted"
