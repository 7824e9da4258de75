# SPDX-License-Identifier: Apache-2.0
"""`lora_expand` on Mosaic GPU: the second half of `lora_mosaic`."""

import jax.numpy as jnp

from pallas_kernels.backend import tuned
from pallas_kernels.layout import SLAB_RANKS, PageLayout
from pallas_kernels.lora_expand.tuning import TUNING
from pallas_kernels.lora_mosaic import GROUPS, slabs_of, lora_kernel
from pallas_kernels.segments import Modules


def lora_expand(y, h, pool, layer, adapters, *, modules: Modules, layout: PageLayout):
    """See `pallas_kernels.lora_expand.lora_expand`."""
    tokens, count, max_rank = h.shape
    slabs = slabs_of(max_rank)
    h = jnp.pad(h, ((0, 0), (0, 0), (0, slabs * SLAB_RANKS - max_rank)))
    h = jnp.tile(h.reshape(tokens, count, slabs, 1, SLAB_RANKS), GROUPS)
    y, _ = lora_kernel(
        None,
        y,
        h,
        pool,
        layer,
        adapters,
        modules=modules,
        max_rank=max_rank,
        layout=layout,
        tuning=tuned(TUNING),
    )
    return y
