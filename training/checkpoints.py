# SPDX-License-Identifier: Apache-2.0
"""Base checkpoints in Hugging Face's on-disk format and adapters in PEFT's."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import load_file, save

from training.batches import BEGIN, END, PAD
from training.dense_llama import LlamaConfig, LoraParams, Params

PEFT_PREFIX = "base_model.model."
# Hugging Face loaders read the framework from here and refuse a file without it.
SAFETENSORS_METADATA = {"format": "pt"}


def round_to_bfloat16(weights: Any) -> Any:
    """The pytree as it will be read back from disk."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, jax.Array]) -> None:
    """Writes a safetensors file."""
    path.write_bytes(save(tensors, metadata=SAFETENSORS_METADATA))


def base_config_json(config: LlamaConfig) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": PAD,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def save_base(directory: Path, params: Params, config: LlamaConfig) -> None:
    """Writes weights, `config.json` and `generation_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", params)
    write_json(directory / "config.json", base_config_json(config))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": BEGIN, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD},
    )


def load_base(directory: Path) -> tuple[Params, LlamaConfig]:
    """Reads what `save_base` wrote; the weights stay bfloat16."""
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fields = {name: content[name] for name in LlamaConfig.__dataclass_fields__}
    return load_file(directory / "model.safetensors"), LlamaConfig(**fields)


def save_adapter(directory: Path, lora: LoraParams, adapter_config: dict[str, Any]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (lora_a, lora_b) in lora.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = lora_a
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = lora_b
    write_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", adapter_config)
