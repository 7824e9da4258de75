# SPDX-License-Identifier: Apache-2.0
"""`lora_expand` as one plain matmul: h spread out to its own segment's ranks, times all B."""

import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import Modules, module_table
from pallas_kernels.slabs import owners, read_matrix


def lora_expand(y, h, pool, layer, adapters, *, modules: Modules, layout: PageLayout):
    """See `pallas_kernels.lora_expand.lora_expand`."""
    mine = owners(adapters, h.shape[0])
    table = module_table(adapters, layer, modules)
    scaled = h[:, None] * table.scale[:, :, None]
    spread = jnp.where(mine[:, :, None, None], scaled, 0.0)  # [T, G, M, R]
    first_tile = layout.b_first_tile(table.first_tile, table.rank, modules.inputs)
    deltas = []
    for m, columns in enumerate(modules.outputs):
        options = {"columns": columns, "max_rank": h.shape[2], "layout": layout}
        b = read_matrix(pool, layer, adapters, first_tile[:, m], table.rank[:, m], **options)
        deltas.append(jnp.einsum("tgr,gro->to", spread[:, :, m], b.astype(jnp.float32)))
    added = y.astype(jnp.float32) + jnp.concatenate(deltas, axis=1)
    return jnp.where(mine.any(axis=1, keepdims=True), added.astype(y.dtype), y)
