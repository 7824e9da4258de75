# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU; its halves have their own."""

from pallas_kernels.lora_gather import Tuning

GATHER = {
    # us of q, k, v at hidden 4096, 64 tokens: on 64 adapters of rank 16 / of ranks 8 to 64 / on one
    # adapter. 2 CTAs a module with 3 stages, of which a multiprocessor holds three, 17.6 / 29.5 /
    # 9.8; with 4 stages, two, 22.2 / 28.2 / 14.8. One CTA 17.1 / 35.4 / 11.1.
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
