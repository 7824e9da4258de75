# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` in Triton: two launches for each list of work."""

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_triton import TUNING, expand, shrink
from pallas_kernels.segments import Modules
from pallas_kernels.triton import tuned


def lora_delta(x, y, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_delta.lora_delta`."""
    static = {"modules": modules, "layout": layout, "tuning": tuned(TUNING)}
    for work in adapters.work:
        where = pool, layer, work, adapters.pages
        h = shrink(x, *where, max_rank=max_rank, **static)
        y = expand(y, h, *where, **static)
    return y
