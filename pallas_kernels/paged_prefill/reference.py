# SPDX-License-Identifier: Apache-2.0
"""`paged_prefill` as a loop over requests and blocks of their queries."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attend, read_kv
from pallas_kernels.layout import PageLayout, ceil_div

QUERY_BLOCK = 16  # small, since most rows of a mixed step are decodes


def paged_prefill(
    q, pool, layer, page_table, query_start, query_len, context_len, *, layout: PageLayout
):
    """See `pallas_kernels.paged_prefill.paged_prefill`."""
    # The pool is read before the loops: a loop that reads a donated buffer costs a copy of it.
    keys, values = read_kv(pool, layer, page_table, context_len, layout)
    column = jnp.arange(keys.shape[1])
    queries = jnp.pad(q, ((0, QUERY_BLOCK), (0, 0), (0, 0)))
    lane = jnp.arange(QUERY_BLOCK)

    def request(b, out):
        def block(i, out):
            done = i * QUERY_BLOCK
            first = query_start[b] + done
            position = context_len[b] - query_len[b] + done + lane
            new = attend(
                jax.lax.dynamic_slice_in_dim(queries, first, QUERY_BLOCK),
                keys[b],
                values[b],
                (column <= position[:, None]) & (column < context_len[b]),
            )
            old = jax.lax.dynamic_slice_in_dim(out, first, QUERY_BLOCK)
            mine = (done + lane < query_len[b])[:, None, None]
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, new, old), first, 0)

        return jax.lax.fori_loop(0, ceil_div(query_len[b], QUERY_BLOCK), block, out)

    out = jax.lax.fori_loop(0, query_len.shape[0], request, jnp.zeros_like(queries))
    return out[: q.shape[0]]
