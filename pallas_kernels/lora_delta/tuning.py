# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU."""

from pallas_kernels.lora_gather import Tuning
from pallas_kernels.lora_grouped import ShrinkTuning
from pallas_kernels.lora_grouped_expand import ExpandTuning

GATHER = {
    # us of q, k, v at hidden 4096, 64 tokens: on 64 adapters of rank 16 / of ranks 8 to 64 / on one
    # adapter. 2 CTAs a module with 3 stages, of which a multiprocessor holds three, 17.6 / 29.5 /
    # 9.8; with 4 stages, two, 22.2 / 28.2 / 14.8. One CTA 17.1 / 35.4 / 11.1.
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
SHRINK = {
    # us of 4096 tokens, 8 adapters of rank 16, q, k, v, with expand: 85.7; 3 stages 85.7, 4 groups
    # 89.9, 2 parts 87.2, 8 parts 90.5.
    "NVIDIA H200": ShrinkTuning(parts=4, stages=2, groups=2),
}
EXPAND = {
    # us of the same, with shrink: 4 stages of y 83.6, 3 85.7; with 3, 16 steps 92.7, width 128
    # (and 4) 88.1; 2 stages of both 105.9.
    "NVIDIA H200": ExpandTuning(width=256, steps=8, y_stages=4, b_stages=3, span=4),
}
