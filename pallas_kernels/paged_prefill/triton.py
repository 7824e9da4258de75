# SPDX-License-Identifier: Apache-2.0
"""`paged_prefill` in Triton: a program for each block of a request's queries and each head."""

import math
from functools import partial

import jax
import triton.language as tl

from pallas_kernels.layout import PageLayout
from pallas_kernels.paged_decode.triton import paged_decode
from pallas_kernels.paged_prefill.items import apart, work_items
from pallas_kernels.paged_prefill.tuning import TRITON, TritonTuning
from pallas_kernels.triton import jit, launch, power_of_two, scalar, stages, tuned
from pallas_kernels.triton_attention import LEAST, attend_pages


def paged_prefill(
    q,
    pool,
    layer,
    page_table,
    query_start,
    query_len,
    context_len,
    *,
    layout: PageLayout,
    tuning: TritonTuning | None = None,
):
    """See `pallas_kernels.paged_prefill.paged_prefill`."""
    decode = partial(paged_decode, layout=layout)
    prefill = partial(_prefill, layout=layout, tuning=tuning or tuned(TRITON))
    spans = query_start, query_len, context_len
    return apart(decode, prefill, q, pool, layer, page_table, *spans)


def _prefill(
    q, pool, layer, page_table, query_start, query_len, context_len, *, layout, tuning: TritonTuning
):
    """Of all who have queries."""
    tokens, heads, dim = q.shape
    items, _ = work_items(
        query_start, query_len, context_len, tokens=tokens, block=tuning.block_queries
    )
    dim_block = power_of_two(dim)
    bytes_of = {  # a step's keys and values, beside all steps' queries
        "step": 4 * tuning.block_keys * dim_block,
        "fixed": 2 * tuning.block_queries * dim_block,
    }
    return launch(
        _attend_block,
        *(q, pool, scalar(layer), page_table, items),
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        # Longest first; neighbours share keys and values.
        grid=(heads, items.shape[0]),
        num_warps=tuning.warps,
        num_stages=stages(tuning.stages, **bytes_of),
        SCALE=dim**-0.5 * math.log2(math.e),
        TOKENS=tokens,
        PAGES=pool.shape[1],
        TABLE=page_table.shape[1],
        ELEMS=layout.page_elems,
        HEADS=heads,
        KV_HEADS=layout.kv_heads,
        ROWS=layout.page_size,
        DIM=dim,
        QUERIES=tuning.block_queries,
        BLOCK=tuning.block_keys,
        DIM_BLOCK=dim_block,
    )


@jit
def _attend_block(
    q,
    pool,
    layer,
    table,
    items,
    result,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
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
):
    head, item = tl.program_id(0), items + tl.program_id(1) * 7  # fields of `items.Item`
    limit = tl.load(item + 4)
    if limit >= 0:  # items past the last are there to fill the grid
        first, start, stop = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        position, request = tl.load(item + 3), tl.load(item + 6)
        row, column = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
        mine = (row >= start) & (row < stop) & (first + row < TOKENS)
        mask = mine[:, None] & (column < DIM)[None, :]
        place = ((first + row) * HEADS + head)[:, None] * DIM + column[None, :]
        rows = tl.load(q + place, mask=mask, other=0.0)

        kv_head = head // (HEADS // KV_HEADS)
        keys = pool + tl.load(layer).to(tl.int64) * PAGES * ELEMS + kv_head * ROWS * DIM
        values = keys + KV_HEADS * ROWS * DIM
        total = tl.zeros([QUERIES], tl.float32)
        highest = tl.full([QUERIES], LEAST, tl.float32)
        out = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
        for key in range(0, limit, BLOCK):
            total, highest, out = attend_pages(
                rows, total, highest, out, keys, values, table + request * TABLE, key, limit,
                position + row, SCALE, ELEMS, ROWS, DIM, BLOCK, DIM_BLOCK,
            )  # fmt: skip
        # Tokens that no request owns have no keys, and get 0.
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(result + place, out.to(result.dtype.element_ty), mask=mask)
