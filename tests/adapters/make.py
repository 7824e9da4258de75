# SPDX-License-Identifier: Apache-2.0
"""Makes PEFT LoRA directories with random weights, as PEFT 0.21 saves them, without torch."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from slora_jax.config import LAYER_MODULES, ModelConfig

BASE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# All that `LoraConfig().save_pretrained` of PEFT 0.21.2 writes.
PEFT_DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def module_path(module: str, layer: int) -> str:
    """Where Hugging Face's Llama has a module; `layer` does not matter outside the layers."""
    if module == "lm_head":
        return "lm_head"
    if module == "embed_tokens":
        return "model.embed_tokens"
    block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def factor_keys(path: str) -> tuple[str, str]:
    """The names that PEFT gives A and B of the module at `path`."""
    if path == "model.embed_tokens":
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    a, b = (f"base_model.model.{path}.{name}" for name in names)
    return a, b


def write_adapter(
    path: Path,
    model_config: ModelConfig,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Iterable[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    layers: Iterable[int] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    rank_of: Callable[[str], int] | None = None,
    scale_std: float = 0.1,
    **config_overrides: Any,
) -> Path:
    """Writes an adapter whose A and B are both random, so that it changes the output.

    Args:
        path: the directory; made if need be.
        model_config: the base.
        rank: `r`.
        alpha: `lora_alpha`.
        modules: names among `LAYER_MODULES` and `OUTER_MODULES`.
        layers: which layers to adapt; None for all.
        seed: of the weights.
        dtype: of the weights: float32, float16 or bfloat16.
        rank_of: the rank of a module path; written as `rank_pattern` where it is not `rank`.
        scale_std: standard deviation of every weight.
        config_overrides: further fields of `adapter_config.json`.

    Returns:
        The directory.
    """
    modules = tuple(modules)
    layers = range(model_config.num_hidden_layers) if layers is None else tuple(layers)
    places = [(module, layer) for module in modules if module in LAYER_MODULES for layer in layers]
    places += [(module, 0) for module in modules if module not in LAYER_MODULES]

    rng = np.random.default_rng(seed)
    tensors, rank_pattern = {}, {}
    for module, layer in places:
        where = module_path(module, layer)
        module_rank = rank_of(where) if rank_of else rank
        if module_rank != rank:
            rank_pattern[f"^{where}"] = module_rank
        inputs, outputs = model_config.projection_shape(module)
        shapes = (module_rank, inputs), (outputs, module_rank)
        for key, shape in zip(factor_keys(where), shapes, strict=True):
            tensors[key] = (rng.standard_normal(shape) * scale_std).astype(DTYPES[dtype])

    fields = {
        **PEFT_DEFAULTS,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "rank_pattern": rank_pattern,
        **config_overrides,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def edit_config(directory: Path, **fields: Any) -> None:
    """Sets fields of `adapter_config.json`; `...` removes one."""
    file = directory / "adapter_config.json"
    merged = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))


def edit_tensors(directory: Path, **tensors: np.ndarray | None) -> None:
    """Sets tensors of `adapter_model.safetensors`; None removes one."""
    file = directory / "adapter_model.safetensors"
    merged = {**load_file(file), **tensors}
    save_file({k: v for k, v in merged.items() if v is not None}, file)
