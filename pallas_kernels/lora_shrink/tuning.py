# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_shrink`, by GPU."""

from pallas_kernels.lora_gather import Tuning
from pallas_kernels.lora_grouped import ShrinkTuning

SINGLE = {
    # What both halves in one launch are best with (`lora_delta/tuning.py`).
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
GROUPED = {
    # us of 4096 tokens, 8 adapters of rank 16, q, k, v, with expand: 85.7; 3 stages 85.7, 4 groups
    # 89.9, 2 parts 87.2, 8 parts 90.5.
    "NVIDIA H200": ShrinkTuning(parts=4, stages=2, groups=2),
}
