# SPDX-License-Identifier: Apache-2.0
"""Fills `LlamaWeights` from a checkpoint, or with random numbers.

Both go through `weight_sources`, which says what every array is fused from. A checkpoint is
compared with it as a whole before the first weight is read. Then one array at a time is read,
fused, cast and sent to its devices, each of which gets its own part and no more; of an Orbax
checkpoint, one layer at a time (`orbax.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
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

from sharding import TENSOR, Placement
from sharding.specs import REPLICATED
from slora_jax.config import ModelConfig
from slora_jax.model.checkpoint import Checkpoint
from slora_jax.model.formats import open_checkpoint
from slora_jax.model.orbax import OrbaxCheckpoint, read_shards
from slora_jax.model.shards import ModelShards
from slora_jax.model.sources import WeightSource, check_tensors, weight_sources
from slora_jax.model.weights import LayerWeights, Linear, LlamaWeights


def load_weights(
    model_dir: Path,
    model: ModelShards,
    dtype: DTypeLike,
    placement: Placement,
    *,
    progress: bool = True,
) -> LlamaWeights:
    """Loads a checkpoint straight into the devices' shards.

    Args:
        model_dir: holds `model.safetensors`, or `model.safetensors.index.json` and its files, or
            `orbax`.
        model: what each device holds.
        dtype: what all weights are cast to.
        placement: the devices.
        progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: the checkpoint does not hold exactly the weights of the model.
    """
    sources = weight_sources(model)
    config, arrays = model.config, {}
    with open_checkpoint(model_dir) as checkpoint:
        check_tensors(checkpoint, sources, tied=config.tie_word_embeddings)
        with progress_bar(enabled=progress) as bar:
            names = [name for source in sources.values() for name in source.names]
            task = bar.add_task("Loading weights", total=sum(map(checkpoint.num_bytes, names)))
            if isinstance(checkpoint, OrbaxCheckpoint):
                read = read_shards(checkpoint, sources, dtype, placement)
            else:
                read = _read(checkpoint, sources, dtype, placement)
            for path, array in read:
                arrays[path] = array
                bar.advance(task, sum(map(checkpoint.num_bytes, sources[path].names)))
    return _assemble(config, arrays)


def dummy_weights(
    model: ModelShards, dtype: DTypeLike, placement: Placement, seed: int = 0
) -> LlamaWeights:
    """Random weights of the true shape, made on the devices: norms are 1, the rest is normal.

    The standard deviation is `fan_in**-0.5`, with which a layer keeps the size of what it is given.
    Every device draws its own: the model is another one on another number of devices.

    Args:
        model: what each device holds.
        dtype: of all weights, which are drawn in it, not cast to it.
        placement: the devices.
        seed: of the random numbers.
    """

    @cache  # one compiled program for each shape, not for each array
    def sampler(shape: tuple[int, ...], fan_in: int, spec: PartitionSpec) -> Callable:
        def sample(number: Array) -> Array:
            if not fan_in:
                return jnp.ones(shape, dtype)
            # "rbg" compiles in half the time of the default generator.
            key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), number)
            if model.size > 1:
                key = jax.random.fold_in(key, jax.lax.axis_index(TENSOR))
            return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

        if model.size == 1:
            return jax.jit(sample, out_shardings=placement.sharding())
        options = {"mesh": placement.mesh, "in_specs": REPLICATED, "out_specs": spec}
        return jax.jit(jax.shard_map(sample, **options, check_vma=False))

    arrays = {
        path: sampler(source.block_shape, source.fan_in, source.spec)(np.uint32(number))
        for number, (path, source) in enumerate(weight_sources(model).items())
    }
    return _assemble(model.config, arrays)


def weight_shapes(model: ModelShards, dtype: DTypeLike, placement: Placement) -> LlamaWeights:
    """The shapes and shardings of the arrays, without their memory."""
    arrays = {
        path: placement.shape(source.block_shape, source.spec, dtype)
        for path, source in weight_sources(model).items()
    }
    return _assemble(model.config, arrays)


def _read(
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    dtype: DTypeLike,
    placement: Placement,
) -> Iterator[tuple[str, Array]]:
    """The arrays, one after another: the host never holds a whole model."""
    in_flight: Array | None = None
    for path, source in sources.items():
        block = partial(_read_block, checkpoint, source, np.dtype(dtype))
        array = placement.put(block, source.block_shape, source.spec)
        # One copy to the devices overlaps with reading the next array, but only one.
        jax.block_until_ready(in_flight)
        in_flight = array
        yield path, array
    jax.block_until_ready(in_flight)


def _read_block(
    checkpoint: Checkpoint, source: WeightSource, dtype: np.dtype, device: int
) -> np.ndarray:
    """What one device holds of an array."""
    axis, parts = source.axis, []
    if axis is None:
        return checkpoint.read(source.names[0]).astype(dtype, copy=False)
    for name, shape, split in zip(source.names, source.shapes, source.splits, strict=True):
        here = split.block(device)
        if here.start == here.stop:  # all padding; safetensors knows no empty slices
            block = np.zeros((*shape[:axis], 0, *shape[axis + 1 :]), dtype)
        else:
            index = (slice(None),) * axis + (here,)
            block = checkpoint.read(name, *index).astype(dtype, copy=False)
        parts.append(split.pad(block, axis))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def progress_bar(enabled: bool) -> Progress:
    """A bar of bytes on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _assemble(config: ModelConfig, arrays: Mapping[str, Any]) -> LlamaWeights:
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
