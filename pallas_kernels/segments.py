# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step belong to which adapter, and where each adapter's matrices lie."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Segments(NamedTuple):
    """Runs of consecutive tokens that share an adapter, from token 0 on.

    Tokens past the last run belong to the base model: they have no segment, cost nothing, and get
    no delta. Padding segments have length 0.
    """

    length: Int[Array, " G"]  # tokens of each run
    pages: Int[Array, "G N"]  # the adapter's pages, padded with the reserved page 0


class ModuleTable(NamedTuple):
    """Where the matrices of M modules lie in each segment's pages. Rank 0: not adapted."""

    rank: Int[Array, "G M"]
    first_tile: Int[Array, "G M"]  # of A; B follows it, see `PageLayout.b_first_tile`
    scale: Float[Array, "G M"]
