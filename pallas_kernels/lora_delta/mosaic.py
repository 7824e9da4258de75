# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` on Mosaic GPU: both halves of `lora_mosaic` in one launch."""

from pallas_kernels.backend import tuned
from pallas_kernels.layout import TILE, PageLayout
from pallas_kernels.lora_delta import reference
from pallas_kernels.lora_delta.tuning import TUNING
from pallas_kernels.lora_gather import lora_gather
from pallas_kernels.segments import Modules


def lora_delta(x, y, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_delta.lora_delta`; odd widths are left to the reference."""
    if any(width % TILE for width in (modules.inputs, *modules.outputs)):
        return reference.lora_delta(
            x, y, pool, layer, adapters, modules=modules, max_rank=max_rank, layout=layout
        )
    return lora_gather(
        x,
        y,
        pool,
        layer,
        adapters,
        modules=modules,
        max_rank=max_rank,
        layout=layout,
        tuning=tuned(TUNING),
    )
