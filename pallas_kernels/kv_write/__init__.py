# SPDX-License-Identifier: Apache-2.0
"""Writing new keys and values into their pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout


def kv_write(
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    *,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "L P elems"]:
    """`pool[layer, page[t]]` gets `k[t]` and `v[t]` at row `offset[t]` of its `[2, K, S, D]`.

    Args:
        pool: donated by the caller's jit; no copy of it is made.
        layer: in `[0, L)`.
        k, v: in the pool's dtype.
        page: in `[1, P)`. Tokens whose page is P or larger are padding and write nothing: page 0
            stays zero.
        offset: in `[0, S)`. Two tokens of one call never share page and offset.

    Returns:
        The updated pool.
    """
    return implementation(__name__, backend).kv_write(
        pool, layer, k, v, page, offset, layout=layout
    )
