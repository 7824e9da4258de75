# SPDX-License-Identifier: Apache-2.0
"""Fills `LlamaWeights` from a Hugging Face checkpoint, or with random numbers.

Both go through `weight_sources`, which says what every array is fused from. A checkpoint is
compared with it as a whole before the first weight is read. Then one array at a time is read,
fused, cast and sent to its devices, so that the host never holds a whole model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from slora_jax.config import ModelConfig
from slora_jax.model.checkpoint import Checkpoint, CheckpointError
from slora_jax.model.weights import LayerWeights, Linear, LlamaWeights

type Placement = Sharding | Callable[[str], Sharding] | None
"""Where arrays go: all alike, or each by its path in `LlamaWeights` ("layers.3.qkv.weight")."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """What one array of `LlamaWeights` is made of.

    Attributes:
        names: the checkpoint's tensors, in the order in which they are fused.
        shapes: their shapes. They differ in the first axis only, along which they are fused.
        fan_in: inputs of the linear layer that the array belongs to; 0 for a norm.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fan_in: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def weight_sources(config: ModelConfig) -> dict[str, WeightSource]:
    """The source of every array, by its path in `LlamaWeights`, first layer first."""
    embed = (config.vocab_size, config.hidden_size)
    norm = (config.hidden_size,)
    sources = {
        "embed_tokens": WeightSource(("model.embed_tokens.weight",), (embed,), config.hidden_size)
    }

    def add_linear(path: str, prefix: str, modules: Sequence[str], bias: bool) -> None:
        fan_in = config.projection_shape(modules[0])[0]
        outputs = [config.projection_shape(module)[1] for module in modules]
        weights = tuple(f"{prefix}{module}.weight" for module in modules)
        shapes = tuple((rows, fan_in) for rows in outputs)
        sources[f"{path}.weight"] = WeightSource(weights, shapes, fan_in)
        if bias:
            biases = tuple(f"{prefix}{module}.bias" for module in modules)
            sources[f"{path}.bias"] = WeightSource(biases, tuple((n,) for n in outputs), fan_in)

    for index in range(config.num_hidden_layers):
        path, prefix = f"layers.{index}", f"model.layers.{index}."
        for name in ("input", "post_attention"):
            sources[f"{path}.{name}_norm"] = WeightSource(
                (f"{prefix}{name}_layernorm.weight",), (norm,)
            )
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        add_linear(f"{path}.qkv", attention, ("q_proj", "k_proj", "v_proj"), config.attention_bias)
        add_linear(f"{path}.o", attention, ("o_proj",), config.attention_bias)
        add_linear(f"{path}.gate_up", mlp, ("gate_proj", "up_proj"), config.mlp_bias)
        add_linear(f"{path}.down", mlp, ("down_proj",), config.mlp_bias)
    sources["norm"] = WeightSource(("model.norm.weight",), (norm,))
    if not config.tie_word_embeddings:
        add_linear("lm_head", "", ("lm_head",), bias=False)
    return sources


def interleave(parts: Sequence[np.ndarray], shards: int) -> np.ndarray:
    """Fuses projections so that each tensor-parallel shard finds its part of all of them together.

    Args:
        parts: arrays `[rows, ...]`, equal but for their rows, which `shards` divides.
        shards: number of equal blocks that each part is cut into.

    Returns:
        `[sum of rows, ...]`: the parts' first blocks, then their second blocks, and so on. With
        q, k, v and two shards: `[q_0 k_0 v_0 | q_1 k_1 v_1]`.

    Raises:
        ValueError: `shards` does not divide the rows of a part.
    """
    for part in parts:
        if len(part) % shards:
            raise ValueError(f"{shards} shards do not divide {len(part)} rows")
    blocks = [part.reshape(shards, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(blocks, axis=1).reshape(-1, *parts[0].shape[1:])


def load_weights(
    model_dir: Path,
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    sharding: Placement = None,
    shards: int = 1,
    progress: bool = True,
) -> LlamaWeights:
    """Loads a checkpoint in safetensors format.

    Args:
        model_dir: holds `model.safetensors`, or `model.safetensors.index.json` and its files.
        config: the model's shape.
        dtype: what all weights are cast to.
        sharding: where each array goes; the default device where None.
        shards: tensor-parallel devices that fused projections are interleaved for.
        progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: the checkpoint does not hold exactly the weights of `config`.
        ValueError: `shards` does not divide the heads or the MLP.
    """
    _check_shards(config, shards)
    sources = weight_sources(config)
    arrays: dict[str, Array] = {}
    with Checkpoint(model_dir) as checkpoint:
        _check_tensors(checkpoint, sources, tied=config.tie_word_embeddings)
        with _progress_bar(enabled=progress) as bar:
            names = [name for source in sources.values() for name in source.names]
            task = bar.add_task("Loading weights", total=sum(map(checkpoint.num_bytes, names)))
            in_flight: Array | None = None
            for path, source in sources.items():
                fused = _read_fused(checkpoint, source, dtype, shards)
                # One copy to the devices overlaps with reading the next array, but only one.
                jax.block_until_ready(in_flight)
                in_flight = arrays[path] = _put(fused, _placed(sharding, path))
                bar.advance(task, sum(map(checkpoint.num_bytes, source.names)))
            jax.block_until_ready(in_flight)
    return _assemble(config, arrays)


def dummy_weights(
    config: ModelConfig, dtype: DTypeLike, seed: int = 0, *, sharding: Placement = None
) -> LlamaWeights:
    """Random weights of the true shape, made on the devices: norms are 1, the rest is normal.

    The standard deviation is `fan_in**-0.5`, with which a layer keeps the size of what it is given.

    Args:
        config: the model's shape.
        dtype: of all weights, which are drawn in it, not cast to it.
        seed: of the random numbers.
        sharding: where each array goes; the default device where None.
    """

    @cache  # one compiled program for each shape, not for each array
    def sampler(shape: tuple[int, ...], fan_in: int, placed: Sharding | None) -> Callable:
        def sample(key: Array) -> Array:
            if not fan_in:
                return jnp.ones(shape, dtype)
            return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

        return jax.jit(sample, out_shardings=placed)

    sources = weight_sources(config)
    # "rbg" compiles in half the time of the default generator.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(sources))
    return _assemble(
        config,
        {
            path: sampler(source.shape, source.fan_in, _placed(sharding, path))(key)
            for (path, source), key in zip(sources.items(), keys, strict=True)
        },
    )


def _check_shards(config: ModelConfig, shards: int) -> None:
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % shards:
            raise ValueError(f"{shards} shards do not divide {name} {getattr(config, name)}")


def _check_tensors(
    checkpoint: Checkpoint, sources: Mapping[str, WeightSource], *, tied: bool
) -> None:
    """Compares names and shapes with what the model needs; reads no weight but a doubtful head."""
    expected = {
        name: shape
        for source in sources.values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    found, where = checkpoint.shapes, checkpoint.model_dir
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing: {_list(missing)}")
    if wrong := [name for name in expected if found[name] != expected[name]]:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors do not have the shape that config.json asks for: "
            f"{name} should be {list(expected[name])} and is {list(found[name])}"
        )
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - expected.keys()
    if tied and "lm_head.weight" in extra:
        if not checkpoint.same("lm_head.weight", "model.embed_tokens.weight"):
            raise CheckpointError(
                f"{where}: lm_head.weight differs from model.embed_tokens.weight, though "
                f"config.json ties them; set 'tie_word_embeddings' to false"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise CheckpointError(
            f"{where}: {len(extra)} tensors have no place in the model that config.json describes: "
            f"{_list(sorted(extra))}"
        )


def _list(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _read_fused(
    checkpoint: Checkpoint, source: WeightSource, dtype: DTypeLike, shards: int
) -> np.ndarray:
    parts = [checkpoint.read(name).astype(dtype, copy=False) for name in source.names]
    return interleave(parts, shards) if len(parts) > 1 else parts[0]


def _placed(sharding: Placement, path: str) -> Sharding | None:
    return sharding(path) if callable(sharding) else sharding


def _put(array: np.ndarray, sharding: Sharding | None) -> Array:
    if sharding is None:
        return jax.device_put(array)
    # Unlike device_put, this does not send the array to the other hosts to compare it with theirs.
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _assemble(config: ModelConfig, arrays: Mapping[str, Array]) -> LlamaWeights:
    def linear(path: str) -> Linear:
        return Linear(weight=arrays[f"{path}.weight"], bias=arrays.get(f"{path}.bias"))

    layers = tuple(
        LayerWeights(
            input_norm=arrays[f"layers.{i}.input_norm"],
            qkv=linear(f"layers.{i}.qkv"),
            o=linear(f"layers.{i}.o"),
            post_attention_norm=arrays[f"layers.{i}.post_attention_norm"],
            gate_up=linear(f"layers.{i}.gate_up"),
            down=linear(f"layers.{i}.down"),
        )
        for i in range(config.num_hidden_layers)
    )
    return LlamaWeights(
        embed_tokens=arrays["embed_tokens"],
        layers=layers,
        norm=arrays["norm"],
        lm_head=None if config.tie_word_embeddings else linear("lm_head"),
    )
