# SPDX-License-Identifier: Apache-2.0
"""Constants of the Mosaic `paged_decode`, by GPU."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel splits its work.

    Attributes:
        ctas: CTAs that share the work: as many as the GPU holds at once.
        block_keys: keys and values of one step.
        stages: steps whose keys and values are in shared memory at once.
        max_splits: most CTAs that share one request's context, where requests alone are too few.
    """

    ctas: int
    block_keys: int = 64
    stages: int = 3
    max_splits: int = 8


TUNING = {
    # TODO(measure)
    "NVIDIA H200": Tuning(ctas=264),
}
