# SPDX-License-Identifier: Apache-2.0
"""How LoRA's Mosaic GPU kernels find an adapter's tiles."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.layout import TILE, TILE_COLUMNS, PageLayout

GROUPS = TILE_COLUMNS // TILE  # runs of 64 columns in a tile


def tile_rows(pool, page_of, layer, tile, first_row, rows, *, spread, layout):
    """Some rows of a tile of an adapter, `[rows, 64]` in memory; see `slabs.tile_address`.

    Args:
        pool: `[L, P, tiles * 64, 64]`.
        page_of: gives the adapter's n-th page.
        spread: the tiles fill the slots of all layers, page after page.
    """
    slot = lax.div(tile, jnp.int32(layout.tiles_per_page))
    row = (tile - slot * layout.tiles_per_page) * TILE + first_row
    number = slot
    if spread:
        number = lax.div(slot, jnp.int32(pool.shape[0]))
        layer = slot - number * pool.shape[0]
    return pool.at[layer, page_of(number), pl.ds(pl.multiple_of(row, rows), rows)]


def tiled_pool(pool: jax.Array, layout: PageLayout) -> jax.Array:
    return pool.reshape(*pool.shape[:2], layout.tiles_per_page * TILE, TILE)
