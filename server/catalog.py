# SPDX-License-Identifier: Apache-2.0
"""The adapters that requests may name: those that are loaded, and those that could be."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from server.config import ServerConfig
from server.directories import Directories
from server.engine_client import AdapterRefused, EngineClient
from server.errors import Forbidden, Invalid, NotFound
from slora_jax.adapters.peft import Signature
from slora_jax.openai.models import ModelCard

logger = logging.getLogger("slora_jax.server")


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter that the engine has.

    Attributes:
        path: its directory.
        pinned: whether it stays in the pool.
        created: seconds since 1970.
        signature: of its files, if it came from `--lora-dir` when a request named it: so it may
            again, and is looked at by each request.
    """

    path: Path
    pinned: bool
    created: int
    signature: Signature | None = None


class AdapterCatalog:
    """Knows what the engine has loaded, and has it load and unload.

    Args:
        config: the server's.
        client: to the engine. Nobody else loads adapters there.
    """

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client
        self._directories = Directories(config.lora_dir, config.adapter_roots)
        self._refused: dict[str, Signature] = {}  # of --lora-dir, as they were then
        self._loads: dict[str, asyncio.Task[None]] = {}  # of --lora-dir, under way
        # One change of a name at a time; a lock is there while somebody has it.
        self._changes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._start = int(time.time())
        self.loaded = {name: Loaded(path, False, self._start) for name, path in config.lora_modules}

    async def known(self, names: Iterable[str]) -> set[str]:
        """Those of some names that adapters have.

        Raises:
            Unavailable: a directory does not answer.
        """
        return {name for name in names if name in self.loaded or await self._directories.has(name)}

    def begin_anew(self) -> dict[str, Loaded]:
        """What a new engine is to load; forgets what comes back by itself."""
        self.loaded = {name: one for name, one in self.loaded.items() if one.signature is None}
        return self.loaded

    def forget(self, name: str) -> None:
        """Takes note that an engine does not have an adapter."""
        self.loaded.pop(name, None)

    async def cards(self) -> list[ModelCard]:
        """The base model, then all adapters by name, those of `--lora-dir` included.

        Those that are there no more, or were refused as they are, are not.

        Raises:
            Unavailable: their directory does not answer.
        """
        base = self._config.served_model_names
        there = await self._directories.signatures()
        names = {name for name, found in there.items() if self._refused.get(name) != found}
        names |= {name for name, one in self.loaded.items() if one.signature is None}
        names -= {*base}
        return [self._card(name) for name in (*base, *sorted(names))]

    async def card(self, name: str) -> ModelCard:
        """Of the base model or an adapter.

        Raises:
            NotFound: nothing has this name.
            Unavailable: its directory does not answer.
        """
        if name not in self._config.served_model_names and not await self.known([name]):
            raise NotFound(f"The model `{name}` does not exist.", "model")
        return self._card(name)

    def _card(self, name: str) -> ModelCard:
        root, parent, created = self._config.model, None, self._start
        if name not in self._config.served_model_names:
            parent = self._config.base_name
            if name in self.loaded:
                root, created = self.loaded[name].path, self.loaded[name].created
            else:
                assert self._config.lora_dir is not None
                root = self._config.lora_dir / name
        limit = None if self._client.ready is None else self._client.ready.max_model_len
        return ModelCard(
            id=name, created=created, root=str(root), parent=parent, max_model_len=limit
        )

    async def ensure_loaded(self, names: Sequence[str | None]) -> None:
        """Has those loaded that only the disk has, or has newer.

        Raises:
            Invalid: one of them is refused.
            Unavailable: one can't be read now, or the engine is not there.
        """
        asked = {name for name in names if name is not None}
        missing = [name for name in asked if not await self._is_current(name)]
        for name in missing:
            if name not in self._loads:
                load = self._loads[name] = asyncio.create_task(self._load_from_directory(name))
                load.add_done_callback(partial(self._loaded_or_not, name))
        for load in [self._loads[name] for name in missing]:
            await asyncio.shield(load)  # others may wait for it as well

    async def load(self, name: str, path: str, *, replace: bool, pinned: bool) -> None:
        """Loads a directory inside the allowed ones.

        Raises:
            Forbidden: loading is not enabled.
            Invalid: the adapter or its place is refused, or the name is taken.
            NotFound: there is no such directory.
            Unavailable: it can't be read now, or the engine is not there.
        """
        self._check_enabled()
        if name in self._config.served_model_names:
            raise Invalid(
                f"The lora adapter '{name}' conflicts with a served base model.", "lora_name"
            )
        directory = await self._directories.confined(path)
        async with self._lock(name):
            if name in self.loaded and not replace:
                raise Invalid(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    "lora_name",
                )
            try:
                await self._client.load_adapter(name, directory, replace=replace, pinned=pinned)
            except AdapterRefused as error:
                raise Invalid(str(error), "lora_path") from error
            self.loaded[name] = Loaded(directory, pinned, int(time.time()))

    async def unload(self, name: str) -> None:
        """Has new requests for an adapter refused; its memory is freed when the last one ends.

        Raises:
            Forbidden: unloading is not enabled.
            NotFound: no adapter has this name.
        """
        self._check_enabled()
        async with self._lock(name):
            if name not in self.loaded:
                raise NotFound(f"The lora adapter '{name}' cannot be found.", "lora_name")
            try:
                await self._client.unload_adapter(name)
            except AdapterRefused as error:
                raise NotFound(str(error), "lora_name") from error
            self.forget(name)

    def _check_enabled(self) -> None:
        if not self._config.allow_runtime_lora_updating:
            raise Forbidden(
                "adapters can't be changed at run time: start the server with "
                "--allow-runtime-lora-updating"
            )

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._changes.get(name)
        if lock is None:
            lock = self._changes[name] = asyncio.Lock()
        return lock

    # --lora-dir

    def _loaded_or_not(self, name: str, load: asyncio.Task[None]) -> None:
        del self._loads[name]
        if not load.cancelled():
            load.exception()  # those who waited have it, if any of them is still there

    async def _load_from_directory(self, name: str) -> None:
        async with self._lock(name):
            if await self._is_current(name):
                return
            # Where the name's links lead may change meanwhile: then the next look sees it.
            directory = await self._directories.named(name)
            signature, known = await self._directories.signature(directory), name in self.loaded
            try:
                await self._client.load_adapter(name, directory, replace=known, pinned=False)
            except AdapterRefused as error:
                self._refused[name] = signature
                if not known:
                    raise Invalid(str(error), "model") from error
                logger.warning(
                    "an adapter has been written anew and is refused: what it was stays",
                    extra={"adapter": name, "reason": str(error)},
                )
            self.loaded[name] = Loaded(directory, False, int(time.time()), signature)

    async def _is_current(self, name: str) -> bool:
        """Whether the engine has what the disk has, as far as there still is something."""
        one = self.loaded.get(name)
        if one is None or one.signature is None:
            return one is not None
        assert self._config.lora_dir is not None
        found = await self._directories.signature(self._config.lora_dir / name)
        return found == one.signature or not await self._directories.has(name)
