# SPDX-License-Identifier: Apache-2.0
"""Constants of the Mosaic `paged_prefill`, by GPU."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel splits its work.

    Attributes:
        ctas: CTAs that share the work items: one for each multiprocessor.
        warpgroups: of a CTA that compute, each on its own 64 rows; one more loads.
        block_keys: keys of one step.
        ring: blocks in shared memory at once, of keys and of values in turn.
        compute_registers, load_registers: of a thread of either kind. All warpgroups' together must
            not exceed what the launch got, or the last to ask waits for ever: 504 of three
            warpgroups, 512 of four.
    """

    ctas: int
    warpgroups: int
    block_keys: int
    ring: int
    compute_registers: int
    load_registers: int


TUNING = {
    # us of 4096 causal tokens, 32/8 heads: 249.8; 64 keys and a ring of 8 342.4. Warpgroups that
    # take turns at the tensor cores 256.1; a softmax that also waits later for its own matmul 262.9
    # (both 264.1): neither is kept.
    "NVIDIA H200": Tuning(
        ctas=132,
        warpgroups=2,
        block_keys=128,
        ring=4,
        compute_registers=224,
        load_registers=56,
    ),
}


@dataclass(frozen=True, slots=True)
class TritonTuning:
    """The same of the Triton `paged_prefill`.

    Attributes:
        block_queries: tokens of a program.
        block_keys: keys and values of one step.
        warps: of a program.
        stages: of its loop's pipeline.
    """

    block_queries: int = 64
    block_keys: int = 64
    warps: int = 4
    stages: int = 3


TRITON = {  # by compute capability
    80: TritonTuning(),
    # On an H200, us of 4096 causal tokens, 32/8 heads: 436.9, though 332 bytes spill. 64 queries
    # 513.6; 32 keys 480.4, with 8 warps and 2 stages 470.3; 8 warps 540.0; 2 stages 519.1.
    90: TritonTuning(block_queries=128),
}
