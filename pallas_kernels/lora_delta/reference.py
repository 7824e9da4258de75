# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` as its two halves, one after the other."""

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_expand.reference import lora_expand
from pallas_kernels.lora_shrink.reference import lora_shrink
from pallas_kernels.segments import Modules


def lora_delta(x, y, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_delta.lora_delta`."""
    where = pool, layer, adapters
    h = lora_shrink(x, *where, modules=modules, max_rank=max_rank, layout=layout)
    return lora_expand(y, h, *where, modules=modules, layout=layout)
