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
