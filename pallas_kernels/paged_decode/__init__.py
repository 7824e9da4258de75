# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per request over its pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout


def paged_decode(
    q: Float[Array, "B H D"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B N"],
    context_len: Int[Array, " B"],
    *,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "B H D"]:
    """`softmax(q kᵀ / √D) v` over the first `context_len` tokens of each request.

    Query head h reads key/value head `h // (H / K)`. Scores and sums are float32.

    Args:
        page_table: page n of a request holds its tokens `n * S ... (n + 1) * S - 1`. Entries past
            `context_len` may be anything in `[0, P)`: what lies there reaches nobody, NaN included.
        context_len: tokens to attend to, the new one included; 0 for a padding row, which gives 0.

    Returns:
        In q's dtype.
    """
    return implementation(__name__, backend).paged_decode(
        q, pool, layer, page_table, context_len, layout=layout
    )
