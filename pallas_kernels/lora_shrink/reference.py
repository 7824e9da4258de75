# SPDX-License-Identifier: Apache-2.0
"""`lora_shrink` in plain XLA: gather each segment's A at `max_rank`, then a ragged matmul."""

import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from pallas_kernels.slabs import read_matrix, segment_matmul


def lora_shrink(x, pool, layer, segments, table, *, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_shrink.lora_shrink`."""
    matrices = [
        read_matrix(
            pool,
            layer,
            segments.pages,
            table.first_tile[:, m],
            table.rank[:, m],
            columns=x.shape[1],
            max_rank=max_rank,
            layout=layout,
        )
        for m in range(table.rank.shape[1])
    ]
    fused = jnp.concatenate(matrices, axis=1).swapaxes(1, 2)
    return segment_matmul(x, fused, segments.length).reshape(x.shape[0], -1, max_rank)
