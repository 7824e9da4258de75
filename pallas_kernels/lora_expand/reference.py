# SPDX-License-Identifier: Apache-2.0
"""`lora_expand` in plain XLA: gather each segment's B, at `max_rank`, then a ragged matmul."""

import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from pallas_kernels.slabs import read_matrix, segment_matmul


def lora_expand(
    y, h, pool, layer, segments, table, *, inputs: int, outputs: tuple[int, ...], layout: PageLayout
):
    """See `pallas_kernels.lora_expand.lora_expand`."""
    deltas = []
    for m, columns in enumerate(outputs):
        b = read_matrix(
            pool,
            layer,
            segments.pages,
            layout.b_first_tile(table.first_tile[:, m], table.rank[:, m], inputs),
            table.rank[:, m],
            columns=columns,
            max_rank=h.shape[2],
            layout=layout,
        )
        scaled = b.astype(jnp.float32) * table.scale[:, m, None, None]
        deltas.append(segment_matmul(h[:, m], scaled, segments.length))
    return (y.astype(jnp.float32) + jnp.concatenate(deltas, axis=1)).astype(y.dtype)
