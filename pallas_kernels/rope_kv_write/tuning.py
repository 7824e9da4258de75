# SPDX-License-Identifier: Apache-2.0
"""Constants of `rope_kv_write`, by GPU."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the kernel.

    Attributes:
        kv_heads: the most key heads that a CTA takes, with their queries and values: a power of
            two. From 4 on, the rows divide among the warps.
    """

    kv_heads: int


TUNING = {
    # us of 32/32 heads at 4096 tokens: 4 61.6, 8 59.9, 32 61.8, XLA 109.6; at 512 15.5, 14.9, 16.2,
    # XLA 18.3; of 32/8 heads at 64 tokens: 4 7.8, 8 11.7, XLA 8.7.
    "NVIDIA H200": Tuning(kv_heads=4),
}
