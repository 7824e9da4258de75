# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU."""

from pallas_kernels.lora_gather import Tuning
from pallas_kernels.lora_grouped import ShrinkTuning
from pallas_kernels.lora_grouped_expand import ExpandTuning

GATHER = {
    # us of q, k, v at hidden 4096, 64 tokens on 64 adapters of rank 16: 3 stages 21.0, 4 22.9;
    # outputs shared by 3 CTAs (ctas=400) 29.6.
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
SHRINK = {
    # us of 4096 tokens, 8 adapters of rank 16, q, k, v: 24.8; 3 stages of 4 groups 27.2.
    "NVIDIA H200": ShrinkTuning(parts=4, stages=2, groups=2),
}
EXPAND = {
    # us of the same: 82.7; 16 steps 84.8, width 128 84.6.
    "NVIDIA H200": ExpandTuning(width=256, steps=8, y_stages=3, b_stages=3, span=4),
}
