# SPDX-License-Identifier: Apache-2.0
"""LoRA matrices to slabs of tiles and back; `layout.py` describes the format."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels.layout import SLAB_RANKS, TILE, TILE_COLUMNS, PageLayout, ceil_div
from pallas_kernels.segments import Adapters


def pack_matrix(
    matrix: Shaped[np.ndarray, "R C"], layout: PageLayout
) -> Shaped[np.ndarray, "tiles elems"]:
    """A matrix of ranks as the tiles of its section, padded with zeros: `[tiles, TILE_ELEMS]`."""
    rank, columns = matrix.shape
    slabs, tiles = ceil_div(rank, SLAB_RANKS), layout.slab_tiles(columns)
    padded = np.zeros((slabs * SLAB_RANKS, tiles * TILE_COLUMNS), matrix.dtype)
    padded[:rank, :columns] = matrix
    blocks = padded.reshape(slabs, SLAB_RANKS, tiles, SLAB_RANKS, TILE)
    packed = blocks.transpose(0, 2, 3, 1, 4).reshape(slabs * tiles, -1)
    section = np.zeros((layout.section_tiles(rank, columns), packed.shape[1]), matrix.dtype)
    section[: len(packed)] = packed
    return section


def tile_address(
    tile: Int[Array, "G ..."],
    pages: Int[Array, "G N"],
    layer: Int[Array, ""] | None,
    layers: int,
    layout: PageLayout,
) -> tuple[Array, Array, Array]:
    """Layer, page and place in the page of adapter tiles.

    Args:
        tile: tiles of each segment's adapter, counted from its first page.
        layer: the layer whose slots of the pages hold the tiles; None for the tensors that belong
            to no layer: they fill the slots of all layers, page after page.
    """
    per_slot = layout.tiles_per_page
    in_page = tile % per_slot
    slot = tile // per_slot
    if layer is None:
        layer, slot = slot % layers, slot // layers
    flat = slot.reshape(slot.shape[0], -1)
    page = jnp.take_along_axis(pages, flat, axis=1, mode="clip").reshape(slot.shape)
    return jnp.broadcast_to(layer, tile.shape), page, in_page


def read_matrix(
    pool: Shaped[Array, "L P E"],
    layer: Int[Array, ""] | None,
    adapters: Adapters,
    first_tile: Int[Array, " G"],
    rank: Int[Array, " G"],
    *,
    columns: int,
    max_rank: int,
    layout: PageLayout,
) -> Shaped[Array, "G R C"]:
    """One LoRA matrix of every segment; zeros past its rank, and for segments without tokens."""
    slabs, stride = ceil_div(max_rank, SLAB_RANKS), layout.slab_tiles(columns)
    used = ceil_div(columns, TILE_COLUMNS)
    offset = stride * jnp.arange(slabs)[:, None] + jnp.arange(used)
    where = tile_address(
        first_tile[:, None, None] + offset, adapters.pages, layer, pool.shape[0], layout
    )
    tiles = pool.reshape(*pool.shape[:2], layout.tiles_per_page, -1).at[where].get(mode="clip")
    groups = tiles.reshape(-1, slabs, used, SLAB_RANKS, SLAB_RANKS, TILE)
    rows = groups.transpose(0, 1, 4, 2, 3, 5).reshape(-1, slabs * SLAB_RANKS, used * TILE_COLUMNS)
    # What lies past the rank is somebody else's: select, never multiply by zero.
    rank = jnp.where(adapters.length > 0, rank, 0)
    mine = jnp.arange(max_rank)[:, None] < rank[:, None, None]
    return jnp.where(mine, rows[:, :max_rank, :columns], jnp.zeros((), pool.dtype))


def owners(adapters: Adapters, tokens: int) -> Bool[Array, "T G"]:
    """Which segment each token belongs to; none for the base model's tokens."""
    ends = jnp.cumsum(adapters.length)
    token = jnp.arange(tokens)[:, None]
    return (token < ends) & (token >= ends - adapters.length)
