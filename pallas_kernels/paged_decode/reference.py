# SPDX-License-Identifier: Apache-2.0
"""`paged_decode` in plain `jax.numpy`: gather every request's pages, then attend."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attend, read_kv
from pallas_kernels.layout import PageLayout


def paged_decode(q, pool, layer, page_table, context_len, *, layout: PageLayout):
    """See `pallas_kernels.paged_decode.paged_decode`."""
    keys, values = read_kv(pool, layer, page_table, context_len, layout)
    allowed = jnp.arange(keys.shape[1]) < context_len[:, None]
    return jax.vmap(attend)(q[:, None], keys, values, allowed[:, None])[:, 0]
