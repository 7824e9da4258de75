# SPDX-License-Identifier: Apache-2.0
"""`lora_lookup` as one gather of single elements."""

import jax.numpy as jnp

from pallas_kernels.layout import SLAB_RANKS, TILE, TILE_COLUMNS, PageLayout
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners, tile_address


def lora_lookup(tokens, pool, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_lookup.lora_lookup`."""
    table = module_table(adapters, None, modules)
    owned = owners(adapters, tokens.shape[0])
    owner = jnp.argmax(owned, axis=1)
    ranks = jnp.arange(max_rank)
    tile = (
        table.first_tile[owner, 0, None]
        + ranks // SLAB_RANKS * layout.slab_tiles(modules.inputs)
        + tokens[:, None] // TILE_COLUMNS
    )  # [T, R]
    column = tokens[:, None] % TILE_COLUMNS
    element = (column // TILE * SLAB_RANKS + ranks % SLAB_RANKS) * TILE + column % TILE
    where = tile_address(tile, adapters.pages[owner], None, pool.shape[0], layout)
    tiles = pool.reshape(*pool.shape[:2], layout.tiles_per_page, -1)
    h = tiles.at[(*where, element)].get(mode="clip").astype(jnp.float32)
    mine = (ranks < table.rank[owner, 0, None]) & owned.any(axis=1, keepdims=True)
    return jnp.where(mine, h, 0.0)[:, None]
