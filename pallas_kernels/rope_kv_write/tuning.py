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
    "NVIDIA H200": Tuning(kv_heads=4),  # TODO(measure)
}
