# SPDX-License-Identifier: Apache-2.0
"""What lives on the device between steps."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import PageLayout, ceil_div
from sharding import Placement
from sharding.specs import POOL, REPLICATED
from slora_jax.adapters.pack import most_pages, table_columns
from slora_jax.config import EngineConfig
from slora_jax.model.llama import LoraTables
from slora_jax.model.shards import ModelShards


class DeviceState(NamedTuple):
    """The pool and the tables that say what its pages hold; in the order of `model_step`."""

    pool: Float[Array, "L P elems"]  # on each device
    page_table: Int[Array, "slots N"]  # KV pages of each slot's request
    last_token: Int[Array, " slots"]  # the last one sampled
    tables: LoraTables


def new_state(
    model: ModelShards, options: EngineConfig, layout: PageLayout, dtype: jnp.dtype
) -> DeviceState:
    """The state before the first step, all zeros; `options` names pages and model length.

    Under `jax.eval_shape` it is the shapes of a state that takes no memory.
    """
    assert options.num_pages is not None
    assert options.max_model_len is not None
    layers, adapters = model.config.num_hidden_layers, options.max_loras
    slots, columns = options.max_num_seqs, ceil_div(options.max_model_len, layout.page_size)
    lines = (adapters, layers + 1, table_columns(model))
    return DeviceState(
        pool=jnp.zeros((layers, options.num_pages, layout.page_elems * model.size), dtype),
        page_table=jnp.zeros((slots, columns), jnp.int32),
        last_token=jnp.zeros(slots, jnp.int32),
        tables=LoraTables(
            pages=jnp.zeros(
                (adapters, most_pages(options.max_lora_rank, model, layout)), jnp.int32
            ),
            rank=jnp.zeros(lines, jnp.int32),
            first_tile=jnp.zeros(lines, jnp.int32),
            scale=jnp.zeros(lines, jnp.float32),
        ),
    )


def state_shardings(placement: Placement) -> DeviceState:
    """Where the state lies."""
    everywhere = placement.sharding(REPLICATED)
    tables = LoraTables(*[everywhere] * 4)  # pyright: ignore[reportArgumentType]
    pool = placement.sharding(POOL)
    return DeviceState(pool, everywhere, everywhere, tables)  # pyright: ignore[reportArgumentType]
