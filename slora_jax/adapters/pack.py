# SPDX-License-Identifier: Apache-2.0
"""An adapter as the pool holds it: pages of tiles, and where each module lies in them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from pallas_kernels.layout import TILE_ELEMS, PageLayout, ceil_div
from pallas_kernels.slabs import pack_matrix
from slora_jax.adapters.peft import Adapter, AdapterError, LoraPair
from slora_jax.config import LAYER_MODULES, OUTER_MODULES, ModelConfig


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter, ready to be copied into pages.

    Attributes:
        pages: `[N, L, page_elems]`: pages outermost, so that any run of them is one contiguous
            copy. Slot l of the first pages holds layer l's modules; the modules that belong to no
            layer fill the slots of the last pages.
        rank, first_tile, scale: the lines of `LoraTables`.
    """

    pages: Shaped[np.ndarray, "N L elems"]
    rank: Int[np.ndarray, "L+1 M"]
    first_tile: Int[np.ndarray, "L+1 M"]
    scale: Float[np.ndarray, "L+1 M"]


def num_pages(adapter: Adapter, config: ModelConfig, layout: PageLayout) -> int:
    """Pages that the adapter takes."""
    layered = max(_tiles(layer, config, layout) for layer in adapter.layers)
    return _num_pages(layered, _tiles(adapter.outer, config, layout), config, layout)


def most_pages(max_rank: int, config: ModelConfig, layout: PageLayout) -> int:
    """Pages of the largest adapter there can be: every module at `max_rank`."""

    def tiles(modules: tuple[str, ...]) -> int:
        shapes = (config.projection_shape(module) for module in modules)
        return sum(layout.module_tiles(max_rank, *shape) for shape in shapes)

    return _num_pages(tiles(LAYER_MODULES), tiles(OUTER_MODULES), config, layout)


def pack(
    adapter: Adapter, config: ModelConfig, layout: PageLayout, dtype: np.dtype
) -> PackedAdapter:
    """Packs an adapter, in the pool's dtype."""
    layers = config.num_hidden_layers
    pages = np.zeros((num_pages(adapter, config, layout), layers, layout.page_elems), dtype)
    table = {
        "rank": np.zeros((layers + 1, len(LAYER_MODULES)), np.int32),
        "first_tile": np.zeros((layers + 1, len(LAYER_MODULES)), np.int32),
        "scale": np.zeros((layers + 1, len(LAYER_MODULES)), np.float32),
    }
    slots = pages.reshape(len(pages), layers, layout.tiles_per_page, TILE_ELEMS)
    for number, modules in enumerate(adapter.layers):
        tiles = _write(modules, LAYER_MODULES, 0, number, table, layout, dtype)
        used = ceil_div(len(tiles), layout.tiles_per_page)
        filled = np.zeros((used * layout.tiles_per_page, TILE_ELEMS), dtype)
        filled[: len(tiles)] = tiles
        slots[:used, number] = filled.reshape(used, layout.tiles_per_page, TILE_ELEMS)
    if adapter.outer:
        layered = max(_tiles(layer, config, layout) for layer in adapter.layers)
        page = ceil_div(layered, layout.tiles_per_page)
        first = page * layers * layout.tiles_per_page
        tiles = _write(adapter.outer, OUTER_MODULES, first, layers, table, layout, dtype)
        slots[page:].reshape(-1, TILE_ELEMS)[: len(tiles)] = tiles
    return PackedAdapter(pages, **table)


def _write(
    modules: Mapping[str, LoraPair],
    names: tuple[str, ...],
    first: int,
    line: int,
    table: dict[str, np.ndarray],
    layout: PageLayout,
    dtype: np.dtype,
) -> Shaped[np.ndarray, "tiles elems"]:
    """Packs one layer's modules one after another and enters them in their line of the table."""
    sections = [np.zeros((0, TILE_ELEMS), dtype)]
    for column, name in enumerate(names):
        if name not in modules:
            continue
        pair = modules[name]
        table["rank"][line, column] = pair.rank
        table["first_tile"][line, column] = first + sum(map(len, sections))
        table["scale"][line, column] = pair.scale
        sections += [pack_matrix(_cast(m, name, dtype), layout) for m in (pair.a, pair.b.T)]
    return np.concatenate(sections)


def _cast(matrix: np.ndarray, name: str, dtype: np.dtype) -> np.ndarray:
    """The matrix in the pool's dtype. Its weights are finite, and must stay so: 0 · inf is NaN."""
    with np.errstate(over="ignore"):
        cast = matrix.astype(dtype)
    if not np.isfinite(cast).all():
        raise AdapterError(f"{name} has weights that overflow {dtype}: serve with dtype bfloat16")
    return cast


def _tiles(modules: Mapping[str, LoraPair], config: ModelConfig, layout: PageLayout) -> int:
    return sum(
        layout.module_tiles(pair.rank, *config.projection_shape(name))
        for name, pair in modules.items()
    )


def _num_pages(layered: int, outer: int, config: ModelConfig, layout: PageLayout) -> int:
    spread = layout.tiles_per_page * config.num_hidden_layers
    return ceil_div(layered, layout.tiles_per_page) + ceil_div(outer, spread)
