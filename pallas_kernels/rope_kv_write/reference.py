# SPDX-License-Identifier: Apache-2.0
"""`rope_kv_write` in plain `jax.numpy`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.kv_write.reference import kv_write
from pallas_kernels.layout import PageLayout


def rope_kv_write(pool, layer, qkv, cos, sin, page, offset, *, heads: int, layout: PageLayout):
    """See `pallas_kernels.rope_kv_write.rope_kv_write`."""
    qkv = qkv.reshape(qkv.shape[0], -1, layout.head_dim)
    q, k, v = jnp.split(qkv, (heads, heads + layout.kv_heads), axis=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, kv_write(pool, layer, k, v, page, offset, layout=layout)


def rotate(
    x: Float[Array, "T heads D"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T heads D"]:
    """Rotates the first half of each head against the second, in x's dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (angle[:, None].astype(x.dtype) for angle in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
