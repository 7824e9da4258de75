# SPDX-License-Identifier: Apache-2.0
"""Constants of the Mosaic `paged_decode`, by GPU."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel splits its work.

    Attributes:
        ctas: most CTAs that share the work; each takes every so-manieth item.
        resident: CTAs that the GPU holds at once. Contexts are split where there are fewer items.
        block_keys: keys and values of one step.
        stages: steps whose keys and values are in shared memory at once.
        few_stages: the same where all items fit on the GPU in a few turns.
        max_splits: most parts of a context.
    """

    ctas: int
    resident: int
    block_keys: int = 64
    stages: int = 2
    few_stages: int = 3
    max_splits: int = 8


TUNING = {
    # 32/32 heads, batch 64, us at context 320 / 2048: an item a CTA with 2 stages 88.2 / 501.9,
    # 3 stages 91.9 / -; 264 CTAs with 3 stages 88.9 / 519.9, 396 with 2 90.4 / 532.4, 132 with 6
    # 91.4 / 529.7. Contexts of 1024..2048: 392.4 against 412.1. The GPU balances unequal lengths
    # better than dealing does. 32/8 heads, with 2 / 3 stages: batch 64 at context 2048 152.6 /
    # 142.3, batch 8 at 8192 78.4 / 79.0.
    "NVIDIA H200": Tuning(ctas=1 << 16, resident=396),
}


@dataclass(frozen=True, slots=True)
class TritonTuning:
    """The same of the Triton `paged_decode`.

    Attributes:
        programs: of a multiprocessor, that keep it busy. Contexts are split where there are fewer.
        block_keys: keys and values of one step.
        max_splits: most parts of a context.
        warps: of a program.
        stages: of its loop's pipeline.
    """

    programs: int = 4
    block_keys: int = 64
    max_splits: int = 16
    warps: int = 4
    stages: int = 3


TRITON = {  # by compute capability
    80: TritonTuning(),
    # On an H200, us of 32/32 heads, batch 64, at context 2048 / 320, of 32/8 heads, batch 64 at
    # 2048 / batch 8 at 8192: 515.6 / 90.1 / 129.6 / 71.7. 4 warps 547.2 / 95.5 / 134.7 / 74.3; 32
    # keys and 2 stages 505.8 / 85.7 / 152.8 / 81.0; 128 keys 522.9 / 98.5 / 158.8 / 85.8.
    90: TritonTuning(warps=2),
}
