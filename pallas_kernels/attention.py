# SPDX-License-Identifier: Apache-2.0
"""What the reference implementations of paged attention share."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import PageLayout


def read_kv(
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B N"],
    context_len: Int[Array, " B"],
    layout: PageLayout,
) -> tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]:
    """Keys and values of every request's pages, zero past its context: C = N * S tokens."""
    rows, pages = page_table.shape
    kv = pool.at[layer, page_table].get(mode="clip")[..., : layout.kv_elems]
    kv = kv.reshape(rows, pages, 2, layout.kv_heads, layout.page_size, layout.head_dim)
    kv = kv.transpose(2, 0, 1, 4, 3, 5).reshape(
        2, rows, pages * layout.page_size, layout.kv_heads, layout.head_dim
    )
    # A masked weight is 0, and 0 * NaN is NaN: foreign rows must be gone before the matmul.
    inside = jnp.arange(kv.shape[2]) < context_len[:, None]
    keys, values = jnp.where(inside[:, :, None, None], kv, 0)
    return keys, values


def attend(
    q: Float[Array, "Q H D"],
    keys: Float[Array, "C K D"],
    values: Float[Array, "C K D"],
    allowed: Bool[Array, "Q C"],
) -> Float[Array, "Q H D"]:
    """Softmax attention in float32; a query that may see nothing gives 0."""
    queries, heads, head_dim = q.shape
    grouped = q.reshape(queries, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("qkgd,ckd->kgqc", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores * head_dim**-0.5, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("kgqc,ckd->qkgd", weights / total, values.astype(jnp.float32))
    return out.reshape(queries, heads, head_dim).astype(q.dtype)
