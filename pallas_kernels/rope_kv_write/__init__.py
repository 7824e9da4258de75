# SPDX-License-Identifier: Apache-2.0
"""Rotating new queries and keys by their position, and writing keys and values into their pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout


def rope_kv_write(
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    qkv: Float[Array, "T O"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    *,
    heads: int,
    layout: PageLayout,
    backend: Backend = "xla",
) -> tuple[Float[Array, "T H D"], Float[Array, "L P elems"]]:
    """Rotary embedding of q and k, then `kv_write` of k and v.

    With `x₁, x₂` the halves of a head, and in the dtype of `qkv`:
    `x₁, x₂ = x₁ cos - x₂ sin, x₂ cos + x₁ sin`.

    Args:
        pool, layer, page, offset: as of `kv_write`. Padding tokens write nothing to the pool.
        qkv: H query heads, K key heads and K value heads of each token, in the pool's dtype.
        cos, sin: float32, of each token's angles: D / 2 of them.
        heads: H.

    Returns:
        The rotated queries, those of padding tokens too, and the updated pool.
    """
    return implementation(__name__, backend).rope_kv_write(
        pool, layer, qkv, cos, sin, page, offset, heads=heads, layout=layout
    )
