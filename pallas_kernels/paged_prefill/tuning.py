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
        take_turns: warpgroups issue their matmuls one after another, so that the softmax of one
            runs beside the matmuls of another.
        overlap: the softmax of a step also runs beside its own warpgroup's matmul.
        compute_registers, load_registers: of a thread of either kind. All warpgroups' together must
            not exceed what the launch got, or the last to ask waits for ever: 504 of three
            warpgroups, 512 of four.
    """

    ctas: int
    warpgroups: int
    block_keys: int
    ring: int
    take_turns: bool
    overlap: bool
    compute_registers: int
    load_registers: int


TUNING = {
    # TODO(measure)
    "NVIDIA H200": Tuning(
        ctas=132,
        warpgroups=2,
        block_keys=128,
        ring=4,
        take_turns=True,
        overlap=True,
        compute_registers=224,
        load_registers=56,
    ),
}
