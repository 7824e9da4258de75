# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` on Mosaic GPU: one launch for single tokens, two where many share an adapter."""

from pallas_kernels.backend import tuned
from pallas_kernels.layout import TILE, PageLayout
from pallas_kernels.lora_delta import reference
from pallas_kernels.lora_delta.tuning import GATHER
from pallas_kernels.lora_expand import tuning as expand
from pallas_kernels.lora_gather import lora_gather
from pallas_kernels.lora_grouped import grouped_shrink
from pallas_kernels.lora_grouped_expand import grouped_expand
from pallas_kernels.lora_shrink import tuning as shrink
from pallas_kernels.segments import Modules


def lora_delta(x, y, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_delta.lora_delta`; odd widths are left to the reference."""
    where = pool, layer, adapters
    static = {"modules": modules, "max_rank": max_rank, "layout": layout}
    if any(width % TILE for width in (modules.inputs, *modules.outputs)):
        return reference.lora_delta(x, y, *where, **static)
    if adapters.block == 1:
        return lora_gather(x, y, *where, **static, tuning=tuned(GATHER))
    h = grouped_shrink(x, *where, **static, tuning=tuned(shrink.GROUPED))
    return grouped_expand(y, h, *where, **static, tuning=expand.grouped(max_rank))
