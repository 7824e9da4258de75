# SPDX-License-Identifier: Apache-2.0
"""Causal attention of ragged chunks of requests over their pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout


def paged_prefill(
    q: Float[Array, "T H D"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B N"],
    query_start: Int[Array, " B"],
    query_len: Int[Array, " B"],
    context_len: Int[Array, " B"],
    *,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "T H D"]:
    """`softmax(q kᵀ / √D) v`, each token over its request's tokens up to and including itself.

    Request b owns tokens `query_start[b] ... query_start[b] + query_len[b] - 1`, which are the last
    `query_len[b]` of its `context_len[b]` tokens; their keys and values are in the pool already.
    Decodes (`query_len` 1) and chunks mix freely.

    Args:
        page_table: as in `paged_decode`.
        query_start: any order; requests don't overlap.
        query_len: 0 for a padding row.

    Returns:
        In q's dtype; 0 for tokens that no request owns.
    """
    return implementation(__name__, backend).paged_prefill(
        q, pool, layer, page_table, query_start, query_len, context_len, layout=layout
    )
