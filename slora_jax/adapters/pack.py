# SPDX-License-Identifier: Apache-2.0
"""An adapter as the pool holds it: pages of tiles, and where each module lies in them.

On several devices each has its own part of an adapter, in the same pages: parts are padded to the
same size, and the tables are alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from pallas_kernels.layout import SLAB_RANKS, TILE_ELEMS, PageLayout, ceil_div
from pallas_kernels.slabs import pack_matrix
from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.peft import Adapter, LoraPair
from slora_jax.config import LAYER_MODULES, OUTER_MODULES
from slora_jax.model.shards import ModelShards


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One device's part of an adapter, ready to be copied into pages.

    Attributes:
        pages: `[N, L, page_elems]`: pages outermost, so that any run of them is one contiguous
            copy. Slot l of the first pages holds layer l's modules; the modules that belong to no
            layer fill the slots of the last pages.
        rank, first_tile, scale: the lines of `LoraTables`.
    """

    pages: Shaped[np.ndarray, "N L elems"]
    rank: Int[np.ndarray, "L+1 C"]
    first_tile: Int[np.ndarray, "L+1 C"]
    scale: Float[np.ndarray, "L+1 C"]


def table_columns(model: ModelShards) -> int:
    """C: a column for each module, or two where A and B are found apart."""
    return len(LAYER_MODULES) * (2 if model.in_halves else 1)


def num_pages(adapter: Adapter, model: ModelShards, layout: PageLayout) -> int:
    """Pages that the adapter takes."""
    outer = _all_tiles(adapter.outer, model, layout)
    return _layer_pages(adapter, model, layout) + _outer_pages(outer, model, layout)


def most_pages(max_rank: int, model: ModelShards, layout: PageLayout) -> int:
    """Pages of the largest adapter there can be: every module at `max_rank`."""
    layered, outer = (
        sum(_tiles(name, max_rank, model, layout) for name in names)
        for names in (LAYER_MODULES, OUTER_MODULES)
    )
    return ceil_div(layered, layout.tiles_per_page) + _outer_pages(outer, model, layout)


def pack(
    adapter: Adapter, model: ModelShards, layout: PageLayout, dtype: np.dtype, device: int = 0
) -> PackedAdapter:
    """Packs what one device holds of an adapter, in the pool's dtype."""
    layers = model.config.num_hidden_layers
    pages = np.zeros((num_pages(adapter, model, layout), layers, layout.page_elems), dtype)
    lines = (layers + 1, table_columns(model))
    table = {
        "rank": np.zeros(lines, np.int32),
        "first_tile": np.zeros(lines, np.int32),
        "scale": np.zeros(lines, np.float32),
    }
    packer = _Packer(model, layout, dtype, device, table)
    slots = pages.reshape(len(pages), layers, layout.tiles_per_page, TILE_ELEMS)
    for number, modules in enumerate(adapter.layers):
        tiles = packer.write(modules, LAYER_MODULES, 0, number)
        used = ceil_div(len(tiles), layout.tiles_per_page)
        filled = np.zeros((used * layout.tiles_per_page, TILE_ELEMS), dtype)
        filled[: len(tiles)] = tiles
        slots[:used, number] = filled.reshape(used, layout.tiles_per_page, TILE_ELEMS)
    if adapter.outer:
        page = _layer_pages(adapter, model, layout)
        first = page * layers * layout.tiles_per_page
        tiles = packer.write(adapter.outer, OUTER_MODULES, first, layers)
        slots[page:].reshape(-1, TILE_ELEMS)[: len(tiles)] = tiles
    return PackedAdapter(pages, **table)


@dataclass(frozen=True, slots=True)
class _Packer:
    """Packs modules for one device and enters them in the tables."""

    model: ModelShards
    layout: PageLayout
    dtype: np.dtype
    device: int
    table: dict[str, np.ndarray]

    def write(
        self, modules: Mapping[str, LoraPair], names: tuple[str, ...], first: int, line: int
    ) -> Shaped[np.ndarray, "tiles elems"]:
        """Packs one line's modules one after another, the first one from tile `first` on."""
        sections = [np.zeros((0, TILE_ELEMS), self.dtype)]
        for column, name in enumerate(names):
            if name not in modules:
                continue
            pair = modules[name]
            a, b = self._parts(name, pair)
            self._enter(line, column, pair, first + sum(map(len, sections)))
            sections.append(self._pack(a, name))
            if self.model.in_halves:
                at = first + sum(map(len, sections))
                self._enter(line, len(LAYER_MODULES) + column, pair, at)
            sections.append(self._pack(b, name))
        return np.concatenate(sections)

    def _enter(self, line: int, column: int, pair: LoraPair, first_tile: int) -> None:
        values = {"rank": pair.rank, "first_tile": first_tile, "scale": pair.scale}
        for field, value in values.items():
            self.table[field][line, column] = value

    def _parts(self, name: str, pair: LoraPair) -> tuple[np.ndarray, np.ndarray]:
        """The device's part of A, and of B transposed: a line for each rank."""
        inputs, outputs, dealt = self.model.lora_splits(name)
        a, b = pair.a, pair.b.T
        if inputs is not None:
            a = inputs.take(a, self.device, axis=1)
        if outputs is not None:
            b = outputs.take(b, self.device, axis=1)
        if dealt:
            slabs = _slabs_held(pair.rank, self.model)
            whole = np.zeros((slabs * self.model.size, SLAB_RANKS, a.shape[1]), a.dtype)
            whole.reshape(-1, a.shape[1])[: len(a)] = a
            a = whole[self.device :: self.model.size].reshape(-1, a.shape[1])
        return a, b

    def _pack(self, matrix: np.ndarray, name: str) -> Shaped[np.ndarray, "tiles elems"]:
        return pack_matrix(_cast(matrix, name, self.dtype), self.layout)


def _cast(matrix: np.ndarray, name: str, dtype: np.dtype) -> np.ndarray:
    """The matrix in the pool's dtype. Its weights are finite, and must stay so: 0 · inf is NaN."""
    with np.errstate(over="ignore"):
        cast = matrix.astype(dtype)
    if not np.isfinite(cast).all():
        raise AdapterError(f"{name} has weights that overflow {dtype}: serve with dtype bfloat16")
    return cast


def _slabs_held(rank: int, model: ModelShards) -> int:
    """Slabs of a matrix whose ranks are dealt out that a device has room for."""
    return ceil_div(ceil_div(rank, SLAB_RANKS), model.size)


def _tiles(name: str, rank: int, model: ModelShards, layout: PageLayout) -> int:
    """Tiles of a module on one device."""
    inputs, outputs = model.config.projection_shape(name)
    of_inputs, of_outputs, dealt = model.lora_splits(name)
    a_rank = _slabs_held(rank, model) * SLAB_RANKS if dealt else rank
    a = layout.section_tiles(a_rank, of_inputs.width if of_inputs else inputs)
    return a + layout.section_tiles(rank, of_outputs.width if of_outputs else outputs)


def _all_tiles(modules: Mapping[str, LoraPair], model: ModelShards, layout: PageLayout) -> int:
    return sum(_tiles(name, pair.rank, model, layout) for name, pair in modules.items())


def _layer_pages(adapter: Adapter, model: ModelShards, layout: PageLayout) -> int:
    tiles = max(_all_tiles(layer, model, layout) for layer in adapter.layers)
    return ceil_div(tiles, layout.tiles_per_page)


def _outer_pages(tiles: int, model: ModelShards, layout: PageLayout) -> int:
    return ceil_div(tiles, layout.tiles_per_page * model.config.num_hidden_layers)
