# SPDX-License-Identifier: Apache-2.0
"""`lora_expand` on Mosaic GPU; XLA puts h as the kernels want it."""

from pallas_kernels.backend import tuned
from pallas_kernels.layout import TILE, PageLayout
from pallas_kernels.lora_expand import reference
from pallas_kernels.lora_expand.tuning import SINGLE, grouped
from pallas_kernels.lora_gather import gather_expand
from pallas_kernels.lora_grouped import of_blocks
from pallas_kernels.lora_grouped_expand import grouped_expand
from pallas_kernels.segments import Modules


def lora_expand(y, h, pool, layer, adapters, *, modules: Modules, layout: PageLayout):
    """See `pallas_kernels.lora_expand.lora_expand`; odd widths are left to the reference."""
    static = {"modules": modules, "layout": layout}
    if any(width % TILE for width in modules.outputs):
        return reference.lora_expand(y, h, pool, layer, adapters, **static)
    for work in adapters.work:
        where = pool, layer, work, adapters.pages
        if work.block == 1:
            y = gather_expand(y, h, *where, **static, tuning=tuned(SINGLE))
        else:
            max_rank = h.shape[2]
            blocks = of_blocks(h, layer, work, modules=modules)
            sized = static | {"max_rank": max_rank, "tuning": grouped(max_rank)}
            y = grouped_expand(y, blocks, *where, **sized)
    return y
