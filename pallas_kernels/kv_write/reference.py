# SPDX-License-Identifier: Apache-2.0
"""`kv_write` as one XLA scatter of rows of D."""

import jax
import jax.numpy as jnp

from pallas_kernels.layout import PageLayout


def kv_write(pool, layer, k, v, page, offset, *, layout: PageLayout):
    """See `pallas_kernels.kv_write.kv_write`."""
    _, heads, head_dim = k.shape
    rows = jnp.stack([k, v], axis=1)  # [T, 2, K, D]
    head = jnp.arange(2 * heads).reshape(2, heads)
    first = (head * layout.page_size + offset[:, None, None]) * head_dim  # [T, 2, K]
    index = jnp.stack(
        [
            jnp.full(first.shape, layer, jnp.int32),
            jnp.broadcast_to(page[:, None, None], first.shape),
            first,
        ],
        axis=-1,
    )
    return jax.lax.scatter(
        pool,
        index,
        rows,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(3,),
            inserted_window_dims=(0, 1),
            scatter_dims_to_operand_dims=(0, 1, 2),
        ),
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
