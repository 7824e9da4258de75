# SPDX-License-Identifier: Apache-2.0
"""`lora_delta` in Triton: one or two launches for each list of work."""

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_triton import TUNING, delta
from pallas_kernels.segments import Modules
from pallas_kernels.triton import tuned


def lora_delta(x, y, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_delta.lora_delta`."""
    static = {"modules": modules, "max_rank": max_rank, "layout": layout, "tuning": tuned(TUNING)}
    for work in adapters.work:
        y = delta(x, y, pool, layer, work, adapters.pages, **static)
    return y
