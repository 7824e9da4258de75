# SPDX-License-Identifier: Apache-2.0
"""`rope_kv_write` as one Mosaic GPU kernel: a warpgroup for some heads of one token.

At decode's sizes the launch and one trip to memory are all that takes time. So nothing goes
through shared memory or TMA, and all loads, the page's number among them, are issued at once.
"""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import tuned
from pallas_kernels.kv_write.mosaic import row_layout
from pallas_kernels.layout import PageLayout
from pallas_kernels.mosaic import store
from pallas_kernels.rope_kv_write.tuning import TUNING, Tuning


def rope_kv_write(
    pool,
    layer,
    qkv,
    cos,
    sin,
    page,
    offset,
    *,
    heads: int,
    layout: PageLayout,
    tuning: Tuning | None = None,
):
    """See `pallas_kernels.rope_kv_write.rope_kv_write`."""
    tuning = tuning or tuned(TUNING)
    tokens, dtype = qkv.shape[0], qkv.dtype
    kv_heads, half = layout.kv_heads, layout.head_dim // 2
    # A CTA takes one part of the queries, of the keys and of the values.
    kv_part = math.gcd(kv_heads, tuning.kv_heads)
    parts = kv_heads // kv_part
    q_part = heads // parts

    @pl.kernel(
        out_type=jax.ShapeDtypeStruct((tokens, heads, 2, half), dtype),
        mesh=plgpu.Mesh(grid=(tokens, parts), grid_names=("token", "part")),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # nothing is read back
        name="rope_kv_write",
    )
    def kernel(pool_gmem, layer_gmem, qkv_gmem, cos_gmem, sin_gmem, page_gmem, offset_gmem, q_gmem):
        token, part = lax.axis_index("token"), lax.axis_index("part")
        layer, page, row = layer_gmem[0], page_gmem[token], offset_gmem[token]

        def load(first, count):
            """The first and the second halves of `count` heads."""
            return [
                plgpu.load(
                    qkv_gmem.at[token, pl.ds(first, count), i],
                    layout=row_layout(count, half),
                    optimized=False,
                )
                for i in range(2)
            ]

        def rotate(x):
            shape = x[0].shape
            cos, sin = (
                plgpu.load(gmem.at[token], layout=row_layout(*shape).reduce(0), optimized=False)
                for gmem in (cos_gmem, sin_gmem)
            )
            cos, sin = (lax.broadcast_in_dim(a.astype(dtype), shape, [1]) for a in (cos, sin))
            return x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin

        first_q, first_kv = part * q_part, part * kv_part
        q = load(first_q, q_part)
        k = load(heads + first_kv, kv_part)
        v = load(heads + kv_heads + first_kv, kv_part)
        q, k = rotate(q), rotate(k)
        for i in range(2):
            store(q_gmem.at[token, pl.ds(first_q, q_part), i], q[i])

        @pl.when(page < pool.shape[1])
        def _():
            mine = pl.ds(first_kv, kv_part)
            for which, x in enumerate((k, v)):
                for i in range(2):
                    store(pool_gmem.at[layer, page, which, mine, row, i], x[i])

    # The kernel writes into what the caller donated. Pages keep an axis of their own: elements of
    # a pool are more than 32 bits can count.
    ref = jax.new_ref(pool.reshape(*pool.shape[:2], 2, kv_heads, layout.page_size, 2, half))
    qkv = qkv.reshape(tokens, heads + 2 * kv_heads, 2, half)
    q = kernel(ref, layer.reshape(1), qkv, cos, sin, page, offset)
    return q.reshape(tokens, heads, layout.head_dim), jax.freeze(ref).reshape(pool.shape)
