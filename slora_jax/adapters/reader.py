# SPDX-License-Identifier: Apache-2.0
"""From a PEFT directory to an adapter in host memory, ready to be copied to the device."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from pallas_kernels.layout import PageLayout
from sharding import Placement
from sharding.specs import PAGES
from slora_jax.adapters.errors import AdapterError, AdapterUnavailable
from slora_jax.adapters.pack import PackedAdapter, num_pages, pack
from slora_jax.adapters.peft import Signature, read_adapter, signature_of
from slora_jax.config import LAYER_MODULES
from slora_jax.model.formats import open_checkpoint
from slora_jax.model.shards import ModelShards

CHUNKS = (8, 4, 2, 1)  # pages that are copied and installed at a time: a program for each


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """An adapter in host memory, page-locked where there is a device to copy to.

    Attributes:
        id: SHA-256 of what was read: the same weights have the same id, wherever they come from.
        path: the directory.
        signature: of its files, just before they were read; see `signature_of`.
        rank: the largest of any module.
        num_pages: that it takes in the pool.
        chunks: its pages in order, `[n, L, page_elems]` of each device, with n of `CHUNKS`.
        tables: lines of `LoraTables`: rank, first_tile and scale, `[L+1, C]` each.
    """

    id: str
    path: Path
    signature: Signature
    rank: int
    num_pages: int
    chunks: tuple[Array, ...]
    tables: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of this process's memory."""
        shards = (shard for chunk in self.chunks for shard in chunk.addressable_shards)
        return sum(shard.data.nbytes for shard in shards)

    @property
    def adapted(self) -> frozenset[str]:
        """Modules of layers that it adapts."""
        rank, _, _ = self.tables
        adapted = rank[:-1, : len(LAYER_MODULES)].any(axis=0)
        return frozenset(name for name, yes in zip(LAYER_MODULES, adapted, strict=True) if yes)

    @property
    def has_outer(self) -> bool:
        """Whether it adapts the embedding or the head."""
        rank, _, _ = self.tables
        return bool(rank[-1].any())


class AdapterReader:
    """Reads adapters for one base model and one pool. May be used by several threads.

    Args:
        model: the base model, and what each device holds of it and of its adapters.
        layout: of the pool's pages.
        dtype: of the pool.
        max_rank: largest rank that is accepted.
        capacity: pages of the pool: an adapter that can never fit is refused.
        model_dir: the base model's checkpoint, to compare with the copies of its embeddings that
            PEFT saves; None for random weights.
        placement: the devices.
        time_limit_s: of each read.
        memory_kind: of JAX, where adapters are kept: "pinned_host", memory of the host that
            devices copy from; "device" on a CPU.
    """

    def __init__(
        self,
        model: ModelShards,
        layout: PageLayout,
        dtype: np.dtype,
        *,
        max_rank: int,
        capacity: int,
        model_dir: Path | None,
        placement: Placement,
        time_limit_s: float = math.inf,
        memory_kind: str = "device",
    ):
        self._model = model
        self._layout = layout
        self._dtype = dtype
        self._max_rank = max_rank
        self._capacity = capacity
        self._model_dir = model_dir
        self._placement = placement
        self._time_limit_s = time_limit_s
        self._memory_kind = memory_kind

    def read(self, path: str | Path, name: str | None = None) -> HostAdapter:
        """Reads and checks a directory.

        Raises:
            AdapterError: it is not served as PEFT would; `name` is what the message calls it.
            AdapterUnavailable: it cannot be read now, or not in time.
        """
        path = Path(os.path.abspath(path))
        signature = signature_of(path)
        adapter = read_adapter(
            path,
            self._model.config,
            name=name,
            max_rank=self._max_rank,
            base_weight=self._read_base if self._model_dir else None,
            time_limit_s=self._time_limit_s,
        )
        pages = num_pages(adapter, self._model, self._layout)
        if pages > self._capacity:
            raise AdapterError(
                f"the adapter {adapter.name!r} of rank {adapter.max_rank} takes {pages} pages, the "
                f"pool has {self._capacity}: raise num_pages"
            )
        packed = {
            device: pack(adapter, self._model, self._layout, self._dtype, device)
            for device in self._placement.own
        }
        return host_adapter(
            packed,
            id=adapter.digest,
            path=path,
            signature=signature,
            rank=adapter.max_rank,
            placement=self._placement,
            memory_kind=self._memory_kind,
        )

    def _read_base(self, module: str) -> np.ndarray:
        """The base's `embed_tokens` or `lm_head`, `[V, E]`."""
        assert self._model_dir is not None
        own_head = module == "lm_head" and not self._model.config.tie_word_embeddings
        with open_checkpoint(self._model_dir) as checkpoint:
            return checkpoint.read("lm_head.weight" if own_head else "model.embed_tokens.weight")


def host_adapter(
    packed: Mapping[int, PackedAdapter],
    *,
    id: str,
    path: Path,
    signature: Signature,
    rank: int,
    placement: Placement,
    memory_kind: str,
) -> HostAdapter:
    """Cuts a packed adapter into chunks and puts them where it is to be kept.

    Args:
        packed: what each of this process's devices holds, by its place on the tensor axis.

    Raises:
        AdapterUnavailable: there is no page-locked memory left.
    """
    one = next(iter(packed.values()))
    chunks, first = [], 0
    try:
        for size in chunk_sizes(len(one.pages)):
            chunk = partial(_pages, packed, slice(first, first + size))
            shape = (size, *one.pages.shape[1:])
            chunks.append(placement.put(chunk, shape, PAGES, memory_kind))
            first += size
        jax.block_until_ready(chunks)
    except jax.errors.JaxRuntimeError as error:
        raise AdapterUnavailable(
            f"{path}: no page-locked memory is left for it. Lower max_cpu_lora_gib, or raise "
            "the environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
        ) from error
    tables = one.rank, one.first_tile, one.scale
    return HostAdapter(id, path, signature, rank, len(one.pages), tuple(chunks), tables)


def _pages(packed: Mapping[int, PackedAdapter], rows: slice, device: int) -> np.ndarray:
    return packed[device].pages[rows]


def chunk_sizes(pages: int) -> list[int]:
    """Sizes of the chunks of so many pages, largest first."""
    sizes = []
    for size in CHUNKS:
        sizes += [size] * (pages // size)
        pages %= size
    return sizes
