# SPDX-License-Identifier: Apache-2.0
"""What every array of `LlamaWeights` is fused from, and what each device holds of it.

The tensors' names and shapes are Hugging Face's, whatever format they are stored in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jax.sharding import PartitionSpec

from sharding import Split
from sharding.specs import REPLICATED, sharded_axis, weight_spec
from slora_jax.model.checkpoint import CheckpointError
from slora_jax.model.shards import ModelShards


class Tensors(Protocol):
    """A checkpoint, in whatever format: its tensors by their Hugging Face names."""

    model_dir: Path
    shapes: dict[str, tuple[int, ...]]

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        ...

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal."""
        ...


@dataclass(frozen=True, slots=True)
class WeightSource:
    """What one array of `LlamaWeights` is made of.

    Attributes:
        names: the checkpoint's tensors, in the order in which they are fused.
        shapes: their shapes. They differ in the first axis only, along which they are fused.
        spec: how the array is sharded.
        splits: how each tensor is dealt out along the axis that `spec` names; none if it names
            none. A device's parts are fused: with q, k, v and two devices `[q_0 k_0 v_0 | q_1 k_1
            v_1]`.
        fan_in: inputs of the linear layer that the array belongs to; 0 for a norm.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    spec: PartitionSpec = REPLICATED
    splits: tuple[Split, ...] = ()
    fan_in: int = 0

    @property
    def axis(self) -> int | None:
        """The axis that is dealt out."""
        return sharded_axis(self.spec)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of what one device holds."""
        axis, shape = self.axis, self.shapes[0]
        if axis is None:
            return shape
        return (*shape[:axis], sum(split.width for split in self.splits), *shape[axis + 1 :])


def weight_sources(model: ModelShards) -> dict[str, WeightSource]:
    """The source of every array, by its path in `LlamaWeights`, first layer first."""
    config, size = model.config, model.size
    sources: dict[str, WeightSource] = {}

    def add_norm(path: str, name: str) -> None:
        sources[path] = WeightSource((f"{name}.weight",), ((config.hidden_size,),))

    def add_linear(path: str, prefix: str, modules: Sequence[str], bias: bool) -> None:
        fan_in = config.projection_shape(modules[0])[0]
        outputs = [config.projection_shape(module)[1] for module in modules]
        spec = weight_spec(f"{path}.weight")
        side = 1 - (sharded_axis(spec) or 0)  # of a weight [O, I]: its outputs or its inputs
        splits = tuple(model.splits(module)[side] for module in modules)
        sources[f"{path}.weight"] = WeightSource(
            tuple(f"{prefix}{module}.weight" for module in modules),
            tuple((rows, fan_in) for rows in outputs),
            spec,
            splits,
            fan_in,
        )
        if bias:
            if side == 0:
                splits = tuple(Split.once(rows, size) for rows in outputs)
            sources[f"{path}.bias"] = WeightSource(
                tuple(f"{prefix}{module}.bias" for module in modules),
                tuple((rows,) for rows in outputs),
                weight_spec(f"{path}.bias"),
                splits,
                fan_in,
            )

    sources["embed_tokens"] = WeightSource(
        ("model.embed_tokens.weight",),
        (config.projection_shape("embed_tokens"),),
        weight_spec("embed_tokens"),
        (model.splits("embed_tokens")[0],),
        config.hidden_size,
    )
    for index in range(config.num_hidden_layers):
        path, prefix = f"layers.{index}", f"model.layers.{index}."
        for name in ("input", "post_attention"):
            add_norm(f"{path}.{name}_norm", f"{prefix}{name}_layernorm")
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        add_linear(f"{path}.qkv", attention, ("q_proj", "k_proj", "v_proj"), config.attention_bias)
        add_linear(f"{path}.o", attention, ("o_proj",), config.attention_bias)
        add_linear(f"{path}.gate_up", mlp, ("gate_proj", "up_proj"), config.mlp_bias)
        add_linear(f"{path}.down", mlp, ("down_proj",), config.mlp_bias)
    add_norm("norm", "model.norm")
    if not config.tie_word_embeddings:
        add_linear("lm_head", "", ("lm_head",), bias=False)
    return sources


def check_tensors(checkpoint: Tensors, sources: Mapping[str, WeightSource], *, tied: bool) -> None:
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
