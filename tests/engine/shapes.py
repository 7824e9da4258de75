# SPDX-License-Identifier: Apache-2.0
"""The arguments of a compiled step as shapes, for compiling without running."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.backend import Backend
from sharding import LoraPartition, Placement, tensor_mesh
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.engine.programs import StepShape
from slora_jax.engine.state import new_state, state_shardings
from slora_jax.model.inputs import Bucket, StepInputs
from slora_jax.model.llama import LoraMode
from slora_jax.model.loader import weight_shapes
from slora_jax.model.shards import ModelShards

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
    backend: Backend = "xla",
    devices: int = 1,
    partition: LoraPartition = "no-comm",
    mesh: Mesh | None = None,
) -> tuple[list[Any], StepShape]:
    """Arguments of `programs.model_step`: weights, pool, page table, …, and its static shape."""
    model = ModelShards(config, devices, partition)
    layout = model.layout(page_size=16)
    placement = Placement(mesh or tensor_mesh(devices))
    options = EngineConfig(
        num_pages=pages,
        max_model_len=config.max_position_embeddings,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_loras=64,
        max_lora_rank=max_rank,
    )
    bucket = Bucket(tokens, rows, rows, rows + tokens // layout.page_size)
    shape = StepShape(
        bucket=bucket,
        max_rank=max_rank,
        model=model,
        layout=layout,
        mesh=placement.mesh,
        backend=backend,
        decode=tokens == rows,
        lora_mode=lora_mode,
    )
    weights = weight_shapes(model, dtype, placement)
    packed = jax.ShapeDtypeStruct((sum(StepInputs.sizes(bucket).values()),), jnp.int32)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: new_state(model, options, layout, dtype)),
        state_shardings(placement),
    )
    return [weights, *state, packed], shape
