# SPDX-License-Identifier: Apache-2.0
"""`lora_shrink` in Triton: a launch for each list of work."""

import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_triton import TUNING, shrink
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners
from pallas_kernels.triton import tuned


def lora_shrink(x, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_shrink.lora_shrink`."""
    tokens = x.shape[0]
    static = {"modules": modules, "max_rank": max_rank, "layout": layout, "tuning": tuned(TUNING)}
    h = jnp.zeros((tokens, modules.count, max_rank), jnp.float32)
    for work in adapters.work:
        found = shrink(x, pool, layer, work, adapters.pages, **static).sum(axis=2)
        h = jnp.where(work.has(tokens)[:, None, None], found, h)
    mine = owners(adapters, tokens)[:, :, None]
    rank = jnp.where(mine, module_table(adapters, layer, modules).rank, 0).sum(axis=1)  # [T, M]
    # What no kernel wrote may be NaN: select, never multiply by zero.
    return jnp.where(jnp.arange(max_rank) < rank[:, :, None], h, 0.0)
