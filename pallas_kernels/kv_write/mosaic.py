# SPDX-License-Identifier: Apache-2.0
"""`kv_write` as one Mosaic GPU kernel: a warpgroup for each token."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import PageLayout
from pallas_kernels.mosaic import store

WARPS, LANES = 4, 32  # of a warpgroup; threads of a warp


def kv_write(pool, layer, k, v, page, offset, *, layout: PageLayout):
    """See `pallas_kernels.kv_write.kv_write`."""
    tokens, heads, head_dim = k.shape
    rows = row_layout(heads, head_dim)

    @pl.kernel(
        mesh=plgpu.Mesh(grid=(tokens,), grid_names=("token",)),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # nothing is read back
        name="kv_write",
    )
    def write(pool_gmem, layer_gmem, k_gmem, v_gmem, page_gmem, offset_gmem):
        token = lax.axis_index("token")
        layer, page, row = layer_gmem[0], page_gmem[token], offset_gmem[token]
        new = [plgpu.load(x.at[token], layout=rows, optimized=False) for x in (k_gmem, v_gmem)]

        @pl.when(page < pool.shape[1])
        def _():
            for which, heads_of_token in enumerate(new):
                store(pool_gmem.at[layer, page, which, :, row], heads_of_token)

    # The kernel writes into what the caller donated. Pages keep an axis of their own: elements of
    # a pool are more than 32 bits can count.
    ref = jax.new_ref(pool.reshape(*pool.shape[:2], 2, heads, layout.page_size, head_dim))
    write(ref, layer.reshape(1), k, v, page, offset)
    return jax.freeze(ref).reshape(pool.shape)


def row_layout(rows: int, columns: int):
    """`[rows, columns]` in the registers of a warpgroup: a warp holds whole rows.

    A lane holds neighbouring columns, so that a warp loads or stores a row at a time, in one piece
    of memory. Rows that don't divide among the warps are held by all of them, which then write the
    same values to the same place.
    """
    spread = rows % WARPS == 0
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS if spread else 1, columns), (columns // LANES,))),
        warp_dims=(-3,) if spread else (plgpu.Replicated(WARPS),),
        lane_dims=(-2,),
        vector_dim=-1,
    )
