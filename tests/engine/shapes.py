# SPDX-License-Identifier: Apache-2.0
"""The arguments of a compiled step as shapes, for compiling without running."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import PageLayout
from slora_jax.adapters.pack import most_pages
from slora_jax.config import LAYER_MODULES, ModelConfig
from slora_jax.engine.programs import StepShape
from slora_jax.model.inputs import Bucket, StepInputs
from slora_jax.model.llama import LoraMode, LoraTables
from slora_jax.model.loader import dummy_weights

TINY = ModelConfig(
    vocab_size=260,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
)
LLAMA_2_7B_4_LAYERS = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=512,
)


def step_shapes(
    config: ModelConfig,
    *,
    pages: int,
    rows: int,
    tokens: int,
    lora_mode: LoraMode,
    dtype: Any,
    max_rank: int = 16,
) -> tuple[list[Any], StepShape]:
    """Arguments of `programs.model_step`: weights, pool, page table, …, and its static shape."""
    layout = PageLayout(config.num_key_value_heads, config.head_dim, page_size=16)
    bucket = Bucket(tokens, rows, rows + tokens // layout.page_size)
    shape = StepShape(bucket, tokens == rows, lora_mode, max_rank, config, layout)
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    adapters, lines = 64, (64, config.num_hidden_layers + 1, len(LAYER_MODULES))
    tables = LoraTables(
        ints((adapters, most_pages(max_rank, config, layout))),
        ints(lines),
        ints(lines),
        jax.ShapeDtypeStruct(lines, jnp.float32),
    )
    args = [
        jax.eval_shape(lambda: dummy_weights(config, dtype)),
        jax.ShapeDtypeStruct((config.num_hidden_layers, pages, layout.page_elems), dtype),
        ints((rows, config.max_position_embeddings // layout.page_size)),
        ints((rows,)),
        tables,
        ints((sum(StepInputs.sizes(bucket).values()),)),
    ]
    return args, shape
