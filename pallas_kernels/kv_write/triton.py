# SPDX-License-Identifier: Apache-2.0
"""`kv_write` as a Triton kernel: a program for each token."""

import triton.language as tl

from pallas_kernels.layout import PageLayout
from pallas_kernels.triton import jit, launch, power_of_two, scalar


def kv_write(pool, layer, k, v, page, offset, *, layout: PageLayout):
    """See `pallas_kernels.kv_write.kv_write`."""
    return launch(
        _write,
        *(scalar(layer), k, v, page, offset),
        updated=pool,
        grid=(k.shape[0],),
        PAGES=pool.shape[1],
        ELEMS=layout.page_elems,
        HEADS=layout.kv_heads,
        ROWS=layout.page_size,
        DIM=layout.head_dim,
        HEAD_BLOCK=power_of_two(layout.kv_heads),
        DIM_BLOCK=power_of_two(layout.head_dim),
    )


@jit
def _write(
    pool,
    layer,
    k,
    v,
    page,
    offset,
    PAGES: tl.constexpr,
    ELEMS: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    mine = tl.load(page + token)
    if mine < PAGES:
        head, column = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
        mask = (head < HEADS) & (column < DIM)
        source = (token * HEADS + head) * DIM + column
        # Elements of a pool are more than 32 bits can count.
        target = pool + (tl.load(layer).to(tl.int64) * PAGES + mine) * ELEMS
        target += (head * ROWS + tl.load(offset + token)) * DIM + column
        tl.store(target, tl.load(k + source, mask=mask), mask=mask)
        tl.store(target + HEADS * ROWS * DIM, tl.load(v + source, mask=mask), mask=mask)
