# SPDX-License-Identifier: Apache-2.0
"""The shape of every shipped adapter, with PEFT's rules for ranks, scales and target modules."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from training.dense_llama import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, LlamaConfig, LoraParams

ALL_PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS


def _match_pattern(pattern: Mapping[str, int], module: str, default: int) -> int:
    """The value of the first key that equals a dotted suffix of `module`, as PEFT matches them."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter's LoRA hyperparameters, under PEFT's names.

    Attributes:
        task: name in `slora_jax.demo.tasks.TASKS`.
        r: default rank.
        lora_alpha: default alpha.
        target_modules: projections that carry LoRA in every layer.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        rank_pattern: ranks of particular modules, by regular expression on the dotted suffix.
        alpha_pattern: alphas of particular modules, likewise.
        steps: training steps that the task needs.
    """

    task: str
    r: int
    lora_alpha: int
    target_modules: tuple[str, ...] = ALL_PROJECTIONS
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    steps: int = 300

    def rank(self, module: str) -> int:
        """Rank of the LoRA pair on `module`."""
        return _match_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Multiplier of the LoRA delta on `module`."""
        alpha = _match_pattern(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def modules(self, config: LlamaConfig) -> dict[str, tuple[int, int]]:
        """The [out, in] shapes of the adapted modules, by module name."""
        return {
            module: shape
            for module, shape in config.projection_shapes().items()
            if module.rpartition(".")[-1] in self.target_modules
        }

    def scales(self, config: LlamaConfig) -> dict[str, float]:
        """The scale of every adapted module."""
        return {module: self.scale(module) for module in self.modules(config)}

    def init_lora(self, key: jax.Array, config: LlamaConfig) -> LoraParams:
        """Random A, [R, in], and zero B, [out, R], so that training starts at the base model."""
        modules = self.modules(config)
        lora = {}
        for module, module_key in zip(modules, jax.random.split(key, len(modules)), strict=True):
            out_features, in_features = modules[module]
            rank, bound = self.rank(module), in_features**-0.5
            lora_a = jax.random.uniform(
                module_key, (rank, in_features), minval=-bound, maxval=bound
            )
            lora[module] = (lora_a, jnp.zeros((out_features, rank)))
        return lora

    def peft_config(self, base_model: str) -> dict[str, Any]:
        """`adapter_config.json` as PEFT writes it."""
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "auto_mapping": None,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": self.lora_alpha,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "revision": None,
            "target_modules": list(self.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }


ADAPTERS: dict[str, AdapterSpec] = {
    spec.task: spec
    for spec in (
        AdapterSpec("upper", r=4, lora_alpha=8, target_modules=ATTENTION_PROJECTIONS),
        AdapterSpec("rot13", r=8, lora_alpha=16, target_modules=MLP_PROJECTIONS),
        AdapterSpec("leet", r=16, lora_alpha=32),
        AdapterSpec("no_vowels", r=12, lora_alpha=24, steps=500),
        AdapterSpec(
            "title",
            r=8,
            lora_alpha=16,
            rank_pattern={"v_proj": 16, "layers.0.mlp.down_proj": 5},
            alpha_pattern={"v_proj": 24},
        ),
        AdapterSpec("snake_case", r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
        AdapterSpec("stars", r=24, lora_alpha=24, target_modules=MLP_PROJECTIONS),
        AdapterSpec("reverse_words", r=64, lora_alpha=128, steps=700),
        AdapterSpec("exclaim", r=6, lora_alpha=6, target_modules=("o_proj", "down_proj")),
        AdapterSpec("double", r=32, lora_alpha=12, use_rslora=True, steps=500),
        AdapterSpec(
            "initials", r=16, lora_alpha=32, target_modules=ATTENTION_PROJECTIONS, steps=500
        ),
    )
}
