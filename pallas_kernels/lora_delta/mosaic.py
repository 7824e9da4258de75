# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` on Mosaic GPU: a launch for single tokens, two for blocks of them."""

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
    static = {"modules": modules, "max_rank": max_rank, "layout": layout}
    if any(width % TILE for width in (modules.inputs, *modules.outputs)):
        return reference.lora_delta(x, y, pool, layer, adapters, **static)
    for work in adapters.work:
        where = pool, layer, work, adapters.pages
        if work.block == 1:
            y = lora_gather(x, y, *where, **static, tuning=tuned(GATHER))
        else:
            h = grouped_shrink(x, *where, **static, tuning=tuned(shrink.GROUPED))
            y = grouped_expand(y, h, *where, **static, tuning=expand.grouped(max_rank))
    return y
