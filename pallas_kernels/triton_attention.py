# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of paged attention share: a step of the online softmax over pages."""

import triton.language as tl

from pallas_kernels.triton import jit

LEAST = tl.constexpr(-1e30)  # a maximum of no scores: from -inf, -inf cannot be taken


@jit
def attend_pages(
    q,
    total,
    highest,
    out,
    keys,
    values,
    pages,
    first,
    limit,
    position,
    scale,
    ELEMS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Some queries over the keys `first ... first + BLOCK - 1` of one request.

    Args:
        q: `[queries, DIM_BLOCK]`.
        total, highest, out: the softmax so far: sums and maxima of each query, and the values.
        keys, values: pointers to the head's first row in page 0.
        pages: pointer to the request's page table.
        limit: keys from here on are not there.
        position: of each query: it sees keys up to its own.
        scale: of the scores, times log₂ e.

    Returns:
        total, highest and out, with these keys.
    """
    token = first + tl.arange(0, BLOCK)
    there = token < limit
    page = tl.load(pages + token // ROWS, mask=there, other=0).to(tl.int64)
    row = page * ELEMS + (token % ROWS) * DIM  # elements of a pool are more than 32 bits can count
    column = tl.arange(0, DIM_BLOCK)
    inside = column < DIM
    # Selected, not multiplied by zero: what lies past the context may be NaN.
    k = tl.load(
        keys + row[None, :] + column[:, None], mask=there[None, :] & inside[:, None], other=0.0
    )
    scores = tl.dot(q, k) * scale
    seen = there[None, :] & (token[None, :] <= position[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - above[:, None])
    shrink = tl.exp2(highest - above)
    v = tl.load(
        values + row[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
    return total * shrink + tl.sum(weights, 1), above, out
