# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_expand`, by GPU."""

from dataclasses import replace

from pallas_kernels.backend import tuned
from pallas_kernels.lora_gather import Tuning
from pallas_kernels.lora_grouped_expand import ExpandTuning

SINGLE = {
    # What both halves in one launch are best with (`lora_delta/tuning.py`).
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
GROUPED = {
    # us of 4096 tokens, 8 adapters of rank 16, q, k, v, with shrink, when a CTA had 8 steps instead
    # of its even share: 4 stages of y 83.6, 3 85.7; width 128 (and 4) 88.1; 2 stages of both 105.9.
    "NVIDIA H200": ExpandTuning(width=256, ctas=132, y_stages=4, b_stages=3, span=4),
}


def grouped(max_rank: int) -> ExpandTuning:
    """`GROUPED`, but h of many slabs takes the place of a stage."""
    tuning = tuned(GROUPED)
    return replace(tuning, b_stages=2) if max_rank > 64 else tuning
