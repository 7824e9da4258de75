# SPDX-License-Identifier: Apache-2.0
"""`lora_shrink` on Mosaic GPU: the first half of `lora_mosaic`, summed over the CTAs by XLA."""

import jax.numpy as jnp

from pallas_kernels.backend import tuned
from pallas_kernels.layout import SLAB_RANKS, PageLayout
from pallas_kernels.lora_mosaic import lora_kernel
from pallas_kernels.lora_shrink.tuning import TUNING
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners


def lora_shrink(x, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_shrink.lora_shrink`."""
    _, parts = lora_kernel(
        x,
        None,
        None,
        pool,
        layer,
        adapters,
        modules=modules,
        max_rank=max_rank,
        layout=layout,
        tuning=tuned(TUNING),
    )
    h = parts[..., :SLAB_RANKS].sum(axis=3)  # each rank is there 8 times
    h = h.reshape(*h.shape[:2], -1)[..., :max_rank]
    # What belongs to nobody was never written.
    rank = module_table(adapters, layer, modules).rank
    mine = owners(adapters, x.shape[0])[:, :, None] & (rank > 0)
    rank_of = jnp.where(mine, rank, 0).sum(axis=1)  # [T, M]
    return jnp.where(jnp.arange(max_rank) < rank_of[:, :, None], h, 0.0)
