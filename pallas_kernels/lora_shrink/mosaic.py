# SPDX-License-Identifier: Apache-2.0
"""`lora_shrink` on Mosaic GPU; XLA puts what the kernels give in order."""

import jax.numpy as jnp

from pallas_kernels.backend import tuned
from pallas_kernels.layout import TILE, PageLayout
from pallas_kernels.lora_gather import gather_shrink
from pallas_kernels.lora_grouped import grouped_shrink, of_tokens
from pallas_kernels.lora_shrink import reference
from pallas_kernels.lora_shrink.tuning import GROUPED, SINGLE
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners


def lora_shrink(x, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_shrink.lora_shrink`; odd widths are left to the reference."""
    tokens = x.shape[0]
    static = {"modules": modules, "max_rank": max_rank, "layout": layout}
    if modules.inputs % TILE:
        return reference.lora_shrink(x, pool, layer, adapters, **static)
    h = jnp.zeros((tokens, modules.count, max_rank), jnp.float32)
    for work in adapters.work:
        where = pool, layer, work, adapters.pages
        if work.block == 1:
            found = gather_shrink(x, *where, **static, tuning=tuned(SINGLE))
        else:
            blocks = grouped_shrink(x, *where, **static, tuning=tuned(GROUPED))
            size = {"tokens": tokens, "max_rank": max_rank}
            found = of_tokens(blocks, layer, work, modules=modules, **size)
        h = jnp.where(work.has(tokens)[:, None, None], found, h)
    mine = owners(adapters, tokens)[:, :, None]
    rank = jnp.where(mine, module_table(adapters, layer, modules).rank, 0).sum(axis=1)  # [T, M]
    # What no kernel wrote may be NaN: select, never multiply by zero.
    return jnp.where(jnp.arange(max_rank) < rank[:, :, None], h, 0.0)
