# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU."""

from pallas_kernels.lora_gather import Tuning
from pallas_kernels.lora_grouped import ShrinkTuning
from pallas_kernels.lora_grouped_expand import ExpandTuning

GATHER = {
    "NVIDIA H200": Tuning(ctas=132, most_parts=4, stages=4),
}
SHRINK = {
    "NVIDIA H200": ShrinkTuning(parts=4, stages=3, groups=4),
}
EXPAND = {
    "NVIDIA H200": ExpandTuning(width=256, steps=8, y_stages=3, b_stages=3, span=4),
}
