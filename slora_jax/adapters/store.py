# SPDX-License-Identifier: Apache-2.0
"""The adapters that the engine knows, packed in host memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallas_kernels.layout import PageLayout
from slora_jax.adapters.pack import PackedAdapter, pack
from slora_jax.adapters.peft import AdapterError, read_adapter
from slora_jax.config import ModelConfig
from slora_jax.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A registered adapter. `digest` is its identity: the same name may hold others over time."""

    path: Path
    digest: str
    rank: int
    packed: PackedAdapter

    @property
    def num_pages(self) -> int:
        return len(self.packed.pages)


class AdapterStore:
    """Reads PEFT directories, checks them against the base model, and keeps them packed.

    Args:
        config: the base model's shape.
        layout: of the pool's pages.
        dtype: of the pool.
        max_rank: largest rank that is accepted.
        capacity: pages of the pool: an adapter that can never fit is refused here.
        model_dir: the base model's checkpoint, to compare with the copies of its embeddings that
            PEFT saves; None for random weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: PageLayout,
        dtype: np.dtype,
        *,
        max_rank: int,
        capacity: int,
        model_dir: Path | None,
    ):
        self._config = config
        self._layout = layout
        self._dtype = dtype
        self._max_rank = max_rank
        self._capacity = capacity
        self._model_dir = model_dir
        self._adapters: dict[str, StoredAdapter] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> StoredAdapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def known(self) -> str:
        """The adapters' names, for messages."""
        names = sorted(self)
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"loaded are {shown}" if names else "none is loaded"

    def register(self, name: str, path: str | Path) -> StoredAdapter:
        """Reads an adapter and makes it known by `name`.

        Raises:
            AdapterError: it is not served as PEFT would; nothing is registered then.
        """
        if not name:
            raise AdapterError("an adapter's name must not be empty")
        if name in self._adapters:
            raise AdapterError(
                f"the adapter {name!r} has already been loaded from "
                f"{self._adapters[name].path}: unload it first"
            )
        adapter = read_adapter(
            path,
            self._config,
            name=name,
            max_rank=self._max_rank,
            base_weight=self._read_base if self._model_dir else None,
        )
        packed = pack(adapter, self._config, self._layout, self._dtype)
        stored = StoredAdapter(Path(path), adapter.digest, adapter.max_rank, packed)
        if stored.num_pages > self._capacity:
            raise AdapterError(
                f"the adapter {name!r} of rank {stored.rank} takes {stored.num_pages} pages, the "
                f"pool has {self._capacity}: raise num_pages"
            )
        self._adapters[name] = stored
        return stored

    def _read_base(self, module: str) -> np.ndarray:
        """The base's `embed_tokens` or `lm_head`, `[V, E]`."""
        assert self._model_dir is not None
        own_head = module == "lm_head" and not self._config.tie_word_embeddings
        with Checkpoint(self._model_dir) as checkpoint:
            return checkpoint.read("lm_head.weight" if own_head else "model.embed_tokens.weight")

    def unregister(self, name: str) -> None:
        del self._adapters[name]

    def packed(self, name: str) -> PackedAdapter:
        return self._adapters[name].packed

    def num_pages(self, name: str) -> int:
        return self._adapters[name].num_pages
