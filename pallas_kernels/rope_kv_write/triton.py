# SPDX-License-Identifier: Apache-2.0
"""`rope_kv_write` as a Triton kernel: a program for some heads of one token."""

import jax
import triton.language as tl

from pallas_kernels.layout import PageLayout, ceil_div
from pallas_kernels.triton import jit, launch, power_of_two, scalar

HEAD_BLOCK = 8  # heads of a program


def rope_kv_write(pool, layer, qkv, cos, sin, page, offset, *, heads: int, layout: PageLayout):
    """See `pallas_kernels.rope_kv_write.rope_kv_write`."""
    tokens, all_heads = qkv.shape[0], heads + 2 * layout.kv_heads
    pool, q = launch(
        _rotate_and_write,
        *(scalar(layer), qkv, cos, sin, page, offset),
        updated=pool,
        out_type=[jax.ShapeDtypeStruct((tokens, heads, layout.head_dim), qkv.dtype)],
        grid=(tokens, ceil_div(all_heads, HEAD_BLOCK)),
        num_warps=2,
        PAGES=pool.shape[1],
        ELEMS=layout.page_elems,
        HEADS=heads,
        KV_HEADS=layout.kv_heads,
        ROWS=layout.page_size,
        DIM=layout.head_dim,
        HEAD_BLOCK=HEAD_BLOCK,
        HALF_BLOCK=power_of_two(layout.head_dim // 2),
    )
    return q, pool


@jit
def _rotate_and_write(
    pool,
    layer,
    qkv,
    cos,
    sin,
    page,
    offset,
    out,
    PAGES: tl.constexpr,
    ELEMS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = column < HALF
    source = qkv + (token * ALL + head) * DIM + column
    first = tl.load(source, mask=(head < ALL) & inside, other=0.0)
    second = tl.load(source + HALF, mask=(head < ALL) & inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    c = tl.load(cos + token * HALF + column, mask=inside, other=0.0).to(dtype)
    s = tl.load(sin + token * HALF + column, mask=inside, other=0.0).to(dtype)
    turned_first = _product(first, c) - _product(second, s)
    turned_second = _product(second, c) + _product(first, s)
    turns = head < HEADS + KV_HEADS  # values don't
    first = tl.where(turns, turned_first.to(dtype), first)
    second = tl.where(turns, turned_second.to(dtype), second)

    target = out + (token * HEADS + head) * DIM + column
    tl.store(target, first, mask=(head < HEADS) & inside)
    tl.store(target + HALF, second, mask=(head < HEADS) & inside)

    mine = tl.load(page + token)
    if mine < PAGES:
        # Keys of all heads, then values of all heads. Elements of a pool need 64 bits.
        target = pool + (tl.load(layer).to(tl.int64) * PAGES + mine) * ELEMS
        target += ((head - HEADS) * ROWS + tl.load(offset + token)) * DIM + column
        mask = (head >= HEADS) & (head < ALL) & inside
        tl.store(target, first, mask=mask)
        tl.store(target + HALF, second, mask=mask)


@jit
def _product(x, angle):
    """In their dtype, as the reference rounds it; then float32, for a sum that is rounded once."""
    return (x.to(tl.float32) * angle.to(tl.float32)).to(x.dtype).to(tl.float32)
