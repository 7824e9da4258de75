# SPDX-License-Identifier: Apache-2.0
"""Small random models and adapters of every kind, written to disk as users have them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from slora_jax.config import LAYER_MODULES, OUTER_MODULES, ModelConfig
from slora_jax.model.shards import ModelShards
from slora_jax.model.sources import weight_sources
from tests.adapters.make import write_adapter

# Neither the vocabulary nor the MLP divides by 2; the kernels' multiple of 64 fits neither.
MHA = ModelConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=45,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
    torch_dtype="float32",
)
# Fewer key/value heads than devices from 4 devices on; the head is the embedding.
GQA = ModelConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    torch_dtype="float32",
)


def write_model(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    """A Hugging Face directory of random float32 weights, without a tokenizer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for source in weight_sources(ModelShards(config)).values():
        for name, shape in zip(source.names, source.shapes, strict=True):
            size = source.fan_in**-0.5 if source.fan_in else 0.1
            tensor = rng.standard_normal(shape) * size + (0 if source.fan_in else 1)
            tensors[name] = tensor.astype(np.float32)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": config.torch_dtype,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(fields))
    return path


def write_adapters(root: Path, config: ModelConfig) -> dict[str, Path]:
    """Adapters by name: of every module, of few, of ranks that divide by nothing."""
    untied = not config.tie_word_embeddings
    outer = OUTER_MODULES if untied else ("embed_tokens",)
    last = config.num_hidden_layers - 1
    kinds = {
        "attention": {"rank": 16},
        "all": {"rank": 8, "modules": (*LAYER_MODULES, *outer)},
        "ranks": {
            "rank": 3,
            "modules": LAYER_MODULES,
            "rank_of": lambda path: 1 + sum(map(ord, path)) % 24,
        },
        "rank 1": {"rank": 1, "modules": ("k_proj", "down_proj", "gate_proj")},
        "one layer": {"rank": 24, "modules": ("q_proj", "o_proj"), "layers": (last,)},
        "outer": {"rank": 5, "modules": outer},
        "rslora": {"rank": 12, "modules": ("v_proj", "up_proj"), "use_rslora": True},
    }
    return {
        name: write_adapter(root / name, config, seed=seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    }
