# SPDX-License-Identifier: Apache-2.0
"""`lora_expand` in Triton: a launch for each list of work."""

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_triton import TUNING, expand
from pallas_kernels.segments import Modules
from pallas_kernels.triton import tuned


def lora_expand(y, h, pool, layer, adapters, *, modules: Modules, layout: PageLayout):
    """See `pallas_kernels.lora_expand.lora_expand`."""
    static = {"modules": modules, "layout": layout, "tuning": tuned(TUNING)}
    for work in adapters.work:
        y = expand(y, h[:, :, None], pool, layer, work, adapters.pages, **static)
    return y
