# SPDX-License-Identifier: Apache-2.0
"""A model's directory without weights, and LoRA adapters of the true shape with random ones."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax.config import ModelConfig

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # that adapters adapt, unless told otherwise
_MLP = ("gate_proj", "up_proj", "down_proj")


def write_model(directory: Path, config: ModelConfig) -> Path:
    """Writes a `config.json`, which is all that random weights need."""
    fields = {
        "model_type": "llama",
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
        "torch_dtype": config.torch_dtype,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes a tokenizer of so many words, so that tokens have texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def write_adapters(
    directory: Path,
    config: ModelConfig,
    *,
    count: int,
    rank: int,
    modules: tuple[str, ...] = MODULES,
    prefix: str = "adapter",
) -> dict[str, Path]:
    """Writes PEFT directories. All link to one file of tensors, but differ in `lora_alpha`.

    Args:
        directory: a new one.
        config: the base.
        count: how many.
        rank: of every module.
        modules: of the layers.
        prefix: of the adapters' names.

    Returns:
        The directories, by the adapters' names.
    """
    directory.mkdir(parents=True)
    rng = np.random.default_rng(list(prefix.encode()))  # adapters of other prefixes are others
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module in modules:
            inputs, outputs = config.projection_shape(module)
            block = "mlp" if module in _MLP else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_"
            for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                weights = rng.standard_normal(shape, np.float32) * inputs**-0.5
                tensors[f"{key}{factor}.weight"] = weights.astype(ml_dtypes.bfloat16)
    file = directory / "tensors.safetensors"
    save_file(tensors, file)
    adapters = {}
    for number in range(count):
        path = adapters[f"{prefix}-{number}"] = directory / str(number)
        path.mkdir()
        os.link(file, path / "adapter_model.safetensors")
        fields = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 1 + number / count,
            "target_modules": list(modules),
        }
        (path / "adapter_config.json").write_text(json.dumps(fields))
    return adapters


def adapter_pages(
    config: ModelConfig, layout: PageLayout, rank: int, modules: tuple[str, ...] = MODULES
) -> int:
    """Pages that such an adapter takes."""
    tiles = sum(layout.module_tiles(rank, *config.projection_shape(name)) for name in modules)
    return ceil_div(tiles, layout.tiles_per_page)


def adapter_elems(config: ModelConfig, rank: int, modules: tuple[str, ...] = MODULES) -> int:
    """Elements of such an adapter's matrices."""
    of_layer = rank * sum(sum(config.projection_shape(name)) for name in modules)
    return config.num_hidden_layers * of_layer
