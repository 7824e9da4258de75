# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU; its halves have their own."""

from pallas_kernels.lora_gather import Tuning

GATHER = {
    # us of q, k, v at hidden 4096, 64 tokens: on 64 adapters of rank 16 / of ranks 8 to 64 / on one
    # adapter. 2 CTAs a module with 3 stages, of which a multiprocessor holds three, 17.6 / 29.5 /
    # 9.8; with 4 stages, two, 22.2 / 28.2 / 14.8. One CTA 17.1 / 35.4 / 11.1. Of o: 64 adapters of
    # rank 16, 2 CTAs 9.5, 4 10.8, one 11.1; of ranks 8 to 64 17.6, 14.8, 26.6; 240 of rank 8, of
    # which two CTAs each don't run at once, 21.3, 21.7, 16.5.
    "NVIDIA H200": Tuning(ctas=384, most_parts=2, stages=3),
}
