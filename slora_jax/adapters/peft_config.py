# SPDX-License-Identifier: Apache-2.0
"""PEFT's `adapter_config.json`: what is read, what is ignored, and what is refused by name.

Every field that PEFT's `LoraConfig` writes is in exactly one of three tables. A field in none of
them is of a newer PEFT or of another program: it may change the result, so it is refused unless it
is switched off.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.patterns import ModulePatterns

READ_FIELDS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "ensure_weight_tying",
})  # fmt: skip

# They say how an adapter was found, placed or trained; its tensors are what that came to.
# `fan_in_fan_out` is about the base's weight: a merge transposes the product, A and B never change.
IGNORED_FIELDS = frozenset({
    "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision",
    "peft_version", "runtime_config", "fan_in_fan_out", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # see init_lora_weights
    "megatron_core", "qalora_group_size",  # see megatron_config, use_qalora
})  # fmt: skip

# Field -> why it cannot be served and what to do, for values other than null, false, empty, "none".
REFUSED_FIELDS: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base weights. Train with use_dora=False",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) is off for a part of the prompt. "
    "Train without alora_invocation_tokens",
    "lora_bias": "biases of LoRA layers are not served. Train with lora_bias=False",
    "bias": 'biases of the base are not served per adapter. Train with bias="none"',
    "modules_to_save": "modules trained in full are not served per adapter. "
    "Train LoRA on them instead: name them in target_modules",
    "trainable_token_indices": "single trained embeddings are not served per adapter. "
    "Train LoRA on them instead: add embed_tokens to target_modules",
    "target_parameters": "LoRA on bare parameters (mixtures of experts) is not served. "
    "Train with target_modules",
    "layer_replication": "the base has other layers then. Train without layer_replication",
    "megatron_config": "Megatron's layers are not served. Train without megatron_config",
    "use_qalora": "QA-LoRA pools a layer's inputs. Train with use_qalora=False",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal. Train without use_bdlora",
    "arrow_config": "Arrow routes tokens between adapters. Serve the single adapters instead",
    "kasa_config": "KaSA changes the base weights. Train without kasa_config",
    "velora_config": "VeLoRA is not supported. Train without velora_config",
    "monteclora_config": "MonteCLoRA samples its weights. Train without monteclora_config",
}

# Initialisations after which the base weights are what they were before.
_INNOCENT_INITS = frozenset(("gaussian", "eva", "orthogonal", "mica"))
# Those that move a part of the base into the adapter, which PEFT can move back when it saves.
_CONVERTIBLE_INIT = re.compile(r"pissa(_niter_[0-9]+)?|olora|corda|lora_ga", re.IGNORECASE)

_LARGEST_ALPHA = float(np.finfo(np.float32).max)  # scales are float32 on the device


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields of PEFT's `LoraConfig` that decide what the stored tensors mean.

    Attributes:
        file: where they were read, for messages.
        rank: `r`.
        alpha: `lora_alpha`.
        use_rslora: divide alpha by the root of the rank, not the rank.
        rank_pattern: ranks of modules that have another one.
        alpha_pattern: alphas of modules that have another one.
        tied: `ensure_weight_tying`: on a base with tied embeddings, `embed_tokens` and `lm_head`
            share one pair of matrices.
    """

    file: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: ModulePatterns[int]
    alpha_pattern: ModulePatterns[float]
    tied: bool

    @classmethod
    def parse(cls, content: bytes, file: Path) -> Self:
        """Reads the content of an `adapter_config.json`.

        Raises:
            AdapterError: not a JSON object, not of a LoRA, or with a field that is missing, of the
                wrong type, or not supported.
        """
        fields = _json_object(content, file)
        if (peft_type := fields.get("peft_type")) != "LORA":
            raise AdapterError(
                f"{file}: peft_type is {peft_type!r}, but only LoRA adapters are served. "
                'Train with LoraConfig, which writes "LORA"'
            )
        _refuse_unsupported(fields, file)
        _refuse_changed_base(fields.get("init_lora_weights"), file)
        for field in ("r", "lora_alpha"):
            if field not in fields:
                raise AdapterError(
                    f"{file}: {field} is missing. Add the value that the adapter was trained with"
                )
        return cls(
            file=file,
            rank=_rank("r", fields["r"], file),
            alpha=_alpha("lora_alpha", fields["lora_alpha"], file),
            use_rslora=_flag("use_rslora", fields.get("use_rslora"), file),
            rank_pattern=_patterns("rank_pattern", fields.get("rank_pattern"), _rank, file),
            alpha_pattern=_patterns("alpha_pattern", fields.get("alpha_pattern"), _alpha, file),
            tied=_flag("ensure_weight_tying", fields.get("ensure_weight_tying"), file),
        )

    def rank_of(self, module_path: str) -> tuple[int, str]:
        """The rank of a module such as `model.layers.0.mlp.up_proj`, and the field that says so."""
        found = self.rank_pattern.find(module_path)
        if found is None:
            return self.rank, "r"
        pattern, rank = found
        return rank, f"rank_pattern[{pattern!r}]"

    def scale_of(self, module_path: str) -> float:
        """What `xAᵀBᵀ` is multiplied by."""
        found = self.alpha_pattern.find(module_path)
        alpha = self.alpha if found is None else found[1]
        rank, _ = self.rank_of(module_path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _json_object(content: bytes, file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not valid JSON ({error}). Save the adapter again") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{file}: not a JSON object. Save the adapter again")
    return fields


def _refuse_unsupported(fields: Mapping[str, Any], file: Path) -> None:
    for field, value in fields.items():
        if field in READ_FIELDS or field in IGNORED_FIELDS or _is_off(value):
            continue
        reason = REFUSED_FIELDS.get(
            field,
            "this field is not known and might change the result. "
            "If it does not, set it to null in the file",
        )
        raise AdapterError(f"{file}: {field} = {value!r} is not supported: {reason}")


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", "none", [], {})


def _refuse_changed_base(init: object, file: Path) -> None:
    """Refuses an adapter to a base that `init_lora_weights` changed before training.

    PEFT converts such an adapter when it saves it, and then writes `true` here.
    """
    if init is None or isinstance(init, bool):
        return
    if isinstance(init, str) and init.lower() in _INNOCENT_INITS:
        return
    if isinstance(init, str) and _CONVERTIBLE_INIT.fullmatch(init):
        remedy = (
            "Save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which converts it to a plain LoRA"
        )
    else:
        remedy = "Train with init_lora_weights=True"
    raise AdapterError(
        f"{file}: init_lora_weights = {init!r} is not supported without conversion: such an "
        f"adapter belongs to a base with changed weights. {remedy}"
    )


def _rank(field: str, value: object, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(
            f"{file}: {field} = {value!r} is not a positive integer. "
            "Give the rank that the adapter was trained with"
        )
    return value


def _alpha(field: str, value: object, file: Path) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= _LARGEST_ALPHA  # NaN is not <= anything
    ):
        raise AdapterError(
            f"{file}: {field} = {value!r} is not a finite number. "
            "Give the alpha that the adapter was trained with"
        )
    return float(value)


def _flag(field: str, value: object, file: Path) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{file}: {field} = {value!r} is neither true nor false. Write one")
    return bool(value)


def _patterns[T](
    field: str, value: object, check: Callable[[str, object, Path], T], file: Path
) -> ModulePatterns[T]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise AdapterError(
            f"{file}: {field} = {value!r} is not an object. "
            "Write a regular expression of module paths for each value, or {}"
        )
    values = {key: check(f"{field}[{key!r}]", item, file) for key, item in value.items()}
    return ModulePatterns(field, values, file)
