# SPDX-License-Identifier: Apache-2.0
"""`lora_shrink` as one plain matmul: every token times every segment's A, then its own is kept."""

import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners, read_matrix


def lora_shrink(x, pool, layer, adapters, *, modules: Modules, max_rank: int, layout: PageLayout):
    """See `pallas_kernels.lora_shrink.lora_shrink`."""
    table = module_table(adapters, layer, modules)
    options = {"columns": modules.inputs, "max_rank": max_rank, "layout": layout}
    matrices = [
        read_matrix(pool, layer, adapters, table.first_tile[:, m], table.rank[:, m], **options)
        for m in range(modules.count)
    ]
    a = jnp.stack(matrices, axis=1)  # [G, M, R, I]
    h = jnp.einsum("ti,gmri->tgmr", x, a, preferred_element_type=jnp.float32)
    mine = owners(adapters, x.shape[0])[:, :, None, None]
    return jnp.where(mine, h, 0.0).sum(axis=1)
