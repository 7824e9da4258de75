# SPDX-License-Identifier: Apache-2.0
"""Looks at adapters' directories. Disks may be slow: no look holds up the event loop or another."""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from server.errors import Invalid, NotFound, Unavailable
from slora_jax.adapters.errors import AdapterUnavailable
from slora_jax.adapters.peft import CONFIG_FILE, Signature, signature_of
from slora_jax.adapters.reads import Reads
from slora_jax.openai.models import is_adapter_name

_THREADS = 4
_PATIENCE_S = 5.0  # for a look, before its requests are told


class Directories:
    """Looks in threads. What a look finds was so after it was asked for.

    All methods raise Unavailable if the disk does not answer.

    Args:
        lora_dir: a directory of adapters' directories, or of links to them.
        roots: directories that adapters may be loaded from, `lora_dir` among them.
    """

    def __init__(self, lora_dir: Path | None, roots: Sequence[Path]) -> None:
        self._lora_dir = lora_dir
        self._roots = roots
        self._reads = Reads("looks", _THREADS, math.inf)
        self._next: dict[str, asyncio.Task] = {}  # looks that have not begun
        # One look at a place at a time; a lock is there while somebody has it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def has(self, name: str) -> bool:
        """Whether `lora_dir` has an adapter of this name."""
        root = self._lora_dir
        if root is None or not is_adapter_name(name) or "/" in name or name in (".", ".."):
            return False
        return await self._look(f"{root / name}: there", lambda: _is_file(root / name))

    async def signatures(self) -> dict[str, Signature]:
        """Of all adapters that `lora_dir` has and that may be loaded, by name."""
        root = self._lora_dir
        if root is None:
            return {}
        return await self._look(f"{root}: all", lambda: _signatures_in(root, self._roots))

    async def signature(self, directory: Path) -> Signature:
        """See `signature_of`."""
        return await self._look(f"{directory}: signature", lambda: signature_of(directory))

    async def confined(self, path: str, param: str = "lora_path") -> Path:
        """See `confined`."""
        what = f"{path}: confined for {param}"
        return await self._look(what, lambda: confined(path, self._roots, param))

    async def named(self, name: str) -> Path:
        """The same of an adapter of `lora_dir`."""
        assert self._lora_dir is not None
        return await self.confined(str(self._lora_dir.absolute() / name), "model")

    async def _look[T](self, what: str, look: Callable[[], T]) -> T:
        """Has a thread look. Those who ask for the same before it begins share what it finds."""
        task = self._next.get(what)
        if task is None:
            task = self._next[what] = asyncio.create_task(self._look_soon(what, look))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.shield(task)
        except (TimeoutError, AdapterUnavailable) as error:
            raise Unavailable(
                "an adapter's directory does not answer: its disk or network may hang",
                retry_after=5,
            ) from error

    async def _look_soon[T](self, what: str, look: Callable[[], T]) -> T:
        lock = self._locks.get(what)
        if lock is None:
            lock = self._locks[what] = asyncio.Lock()
        async with lock:  # until the look has ended, however long that takes
            del self._next[what]
            return await asyncio.wrap_future(self._reads.submit(look))


def _is_file(directory: Path) -> bool:
    try:
        return (directory / CONFIG_FILE).is_file()
    except OSError:  # longer than a file's name may be
        return False


def _signatures_in(root: Path, roots: Sequence[Path]) -> dict[str, Signature]:
    """Of what can be loaded: what has both files, inside of the roots."""
    found = {}
    for directory in (file.parent for file in root.glob(f"*/{CONFIG_FILE}")):
        signature = signature_of(directory)
        if is_adapter_name(directory.name) and all(signature):
            with suppress(Invalid, NotFound):
                confined(str(directory.absolute()), roots)
                found[directory.name] = signature
    return found


def confined(path: str, roots: Sequence[Path], param: str = "lora_path") -> Path:
    """A directory inside one of `roots`, all links followed, and all that lies in it as well.

    Args:
        path: absolute, or relative to one of them.
        roots: directories.
        param: the field that errors name.

    Raises:
        Invalid: it lies elsewhere, or something in it does.
        NotFound: there is no such directory.
    """
    allowed = [root.resolve() for root in roots]

    def is_inside(place: Path) -> bool:
        return any(place.is_relative_to(root) for root in allowed)

    outside = False
    try:
        for root in allowed:
            directory = (root / path).resolve()
            if not is_inside(directory):
                outside = True
            elif directory.is_dir():
                for file in directory.iterdir():
                    if not is_inside(file.resolve()):
                        raise Invalid(
                            f"{path}: {file.name} is a link to a place outside the directories "
                            "that adapters may be loaded from",
                            param,
                        )
                return directory
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, or links in a circle
        raise Invalid(f"{path!r} is no path: {error}", param) from error
    if outside:
        raise Invalid(
            f"{path} is outside the directories that adapters may be loaded from (--lora-roots)",
            param,
        )
    raise NotFound(f"{path}: no such directory", param)
