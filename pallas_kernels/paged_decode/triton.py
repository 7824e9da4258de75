# SPDX-License-Identifier: Apache-2.0
"""`paged_decode` in Triton: a program for each request, key/value head and part of the context.

The query heads of a key/value head are the rows of one matrix product, of 16 rows at least. Where
there are too few programs for the GPU, contexts are cut into parts, which a second launch joins.
"""

import math

import jax
import jax.numpy as jnp
import triton.language as tl

from pallas_kernels.backend import multiprocessors
from pallas_kernels.layout import PageLayout
from pallas_kernels.paged_decode.tuning import TRITON, TritonTuning
from pallas_kernels.triton import jit, launch, power_of_two, scalar, stages, tuned
from pallas_kernels.triton_attention import LEAST, attend_pages

LEAST_ROWS = 16  # of an operand of `tl.dot`


def paged_decode(
    q,
    pool,
    layer,
    page_table,
    context_len,
    *,
    layout: PageLayout,
    tuning: TritonTuning | None = None,
):
    """See `pallas_kernels.paged_decode.paged_decode`."""
    tuning = tuning or tuned(TRITON)
    (rows, heads, dim), kv_heads = q.shape, layout.kv_heads
    longest = page_table.shape[1] * layout.page_size
    # At least two blocks of keys a part: joining costs a launch.
    most = min(tuning.max_splits, longest // (2 * tuning.block_keys))
    wanted = tuning.programs * multiprocessors() // max(rows * kv_heads, 1)
    splits = 1 << (max(min(most, wanted), 1).bit_length() - 1)
    sizes = {"DIM": dim, "DIM_BLOCK": power_of_two(dim), "SPLITS": splits}
    part = (rows, heads, splits)
    outs = jax.ShapeDtypeStruct((*part, dim), jnp.float32 if splits > 1 else q.dtype)
    found = launch(
        _decode,
        *(q, pool, scalar(layer), page_table, context_len),
        out_type=[outs, *[jax.ShapeDtypeStruct(part, jnp.float32)] * 2],
        grid=(rows, kv_heads, splits),
        num_warps=tuning.warps,
        num_stages=stages(tuning.stages, step=4 * tuning.block_keys * sizes["DIM_BLOCK"]),
        **sizes,
        SCALE=dim**-0.5 * math.log2(math.e),
        PAGES=pool.shape[1],
        TABLE=page_table.shape[1],
        ELEMS=layout.page_elems,
        HEADS=heads,
        KV_HEADS=kv_heads,
        ROWS=layout.page_size,
        QUERIES=max(power_of_two(heads // kv_heads), LEAST_ROWS),
        BLOCK=tuning.block_keys,
    )
    if splits == 1:
        return found[0].reshape(rows, heads, dim)
    out_type = [jax.ShapeDtypeStruct((rows, heads, dim), q.dtype)]
    return launch(_join, *found, out_type=out_type, grid=(rows * heads,), **sizes)


@jit
def _decode(
    q,
    pool,
    layer,
    table,
    context_len,
    outs,
    totals,
    maxima,
    SCALE: tl.constexpr,
    PAGES: tl.constexpr,
    TABLE: tl.constexpr,
    ELEMS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A part of the context: its values, and what joins them with others'; if whole, the result."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query, column = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    mine = query < GROUP
    place = request * HEADS + kv_head * GROUP + query
    mask = mine[:, None] & (column < DIM)[None, :]
    rows = tl.load(q + place[:, None] * DIM + column[None, :], mask=mask, other=0.0)

    context = tl.load(context_len + request)
    part = tl.cdiv(tl.cdiv(context, BLOCK), SPLITS) * BLOCK
    first = split * part
    limit = tl.minimum(context, first + part)
    keys = pool + tl.load(layer).to(tl.int64) * PAGES * ELEMS + kv_head * ROWS * DIM
    values = keys + KV_HEADS * ROWS * DIM
    total = tl.zeros([QUERIES], tl.float32)
    highest = tl.full([QUERIES], LEAST, tl.float32)
    out = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    position = tl.zeros([QUERIES], tl.int32) + context
    for key in range(first, limit, BLOCK):
        total, highest, out = attend_pages(
            rows, total, highest, out, keys, values, table + request * TABLE, key, limit, position,
            SCALE, ELEMS, ROWS, DIM, BLOCK, DIM_BLOCK,
        )  # fmt: skip
    place = place * SPLITS + split
    if SPLITS == 1:
        out = out / tl.where(total > 0, total, 1.0)[:, None]
    else:
        tl.store(totals + place, total, mask=mine)
        tl.store(maxima + place, highest, mask=mine)
    target = outs + place[:, None] * DIM + column[None, :]
    tl.store(target, out.to(outs.dtype.element_ty), mask=mask)


@jit
def _join(
    outs,
    totals,
    maxima,
    result,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one query head of one request."""
    query = tl.program_id(0)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    inside = column < DIM
    part = query * SPLITS + split
    highest = tl.load(maxima + part)
    weight = tl.exp2(highest - tl.max(highest, 0))
    total = tl.sum(weight * tl.load(totals + part), 0)
    out = tl.load(outs + part[:, None] * DIM + column[None, :], mask=inside[None, :], other=0.0)
    out = tl.sum(out * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(result + query * DIM + column, out.to(result.dtype.element_ty), mask=inside)
