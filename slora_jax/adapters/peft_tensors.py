# SPDX-License-Identifier: Apache-2.0
"""PEFT's `adapter_model.safetensors`: from the names of its tensors to the modules they adapt.

Knows names and dtypes, not shapes: whether matrices fit the base and each other is for `peft.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, cast

import ml_dtypes
import numpy as np
import safetensors

from slora_jax.adapters.errors import AdapterError
from slora_jax.config import LAYER_MODULES, OUTER_MODULES, ModelConfig

MOST_HEADER = 8 << 20  # bytes; of an adapter of Llama-3.1-405B less than 300 kB
_LONGEST_KEY = 512  # characters; patterns below take quadratic time

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}

_BLOCKS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)

# `….q_proj.lora_A.weight`; of the embedding `….lora_embedding_A`, a bare parameter. What may follow
# A or B is the adapter's name, which PEFT's own save leaves out.
_FACTOR_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(\.(?P<adapter>[^.]+))?(?(embedding)|\.weight)"
)
_BASE_COPY_KEY = re.compile(
    r"base_model\.model\.(model\.embed_tokens|lm_head)(\.base_layer)?\.weight"
)

# What other tensors are, and what to do; the first that is found in the key.
_STRAYS = (
    (
        r"(^|\.)_orig_mod\.",
        "is of a model that torch.compile had wrapped. Save the one inside, model._orig_mod, or "
        "take _orig_mod. out of the tensors' names",
    ),
    (
        r"^(base_model\.model\.)?module\.",
        "is of a model that DistributedDataParallel had wrapped. Save the one inside, "
        "model.module, or take module. out of the tensors' names",
    ),
    (
        r"^(?!base_model\.model\.).*\.lora_(embedding_)?[AB]\b",
        "lacks base_model.model., with which PEFT's names begin. Save with PEFT's "
        "save_pretrained, or put it in front of the tensors' names",
    ),
    (r"\.lora_magnitude_vector\b", "is of a DoRA adapter. Train with use_dora=False"),
    (r"\.lora_diag\b", "is of a KaSA adapter. Train without kasa_config"),
    (r"\.lora_[AB]\b.*\.bias$", "is a bias of a LoRA layer. Train with lora_bias=False"),
    (r"\.bias$", 'is a bias of the base. Train with bias="none"'),
    (r"\.trainable_tokens", "holds single embeddings. Train LoRA on embed_tokens instead"),
    (r"\.experts\b", "is of a mixture of experts. Serve it with the base it was trained on"),
    (
        r"^base_model\.model\..*\.lora_(embedding_)?[AB]\b",
        "adapts a module that the base lacks or that is not served per adapter. "
        f"Train with target_modules among {', '.join(LAYER_MODULES + OUTER_MODULES)}",
    ),
    (r"\.base_layer\.", "is a weight of the base. Save with save_pretrained, which leaves it out"),
    (r"", "is not a LoRA matrix as PEFT names them. Train without modules_to_save"),
)


class Tensor(NamedTuple):
    """An array and its name in the file."""

    key: str
    array: np.ndarray


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The tensors of one adapter.

    Attributes:
        file: where they were read, for messages.
        factors: module path, such as `model.layers.0.mlp.up_proj` -> its "A" and "B"; one may lack.
        base_copies: module and tensor of each copy of the base's `embed_tokens` or `lm_head`, which
            PEFT's `save_embedding_layers` adds.
    """

    file: Path
    factors: Mapping[str, Mapping[str, Tensor]]
    base_copies: Sequence[tuple[str, Tensor]]

    @classmethod
    def parse(cls, content: bytes, config: ModelConfig, file: Path) -> Self:
        """Reads the content of an `adapter_model.safetensors`.

        Raises:
            AdapterError: damaged, no LoRA in it, or a tensor that `config`'s base has no place for.
        """
        paths = module_paths(config)
        factors: dict[str, dict[str, Tensor]] = {}
        base_copies: list[tuple[str, Tensor]] = []
        adapters: set[str | None] = set()
        for tensor in _load(content, file):
            if match := _BASE_COPY_KEY.fullmatch(tensor.key):
                base_copies.append((paths[match[1]].module, tensor))
                continue
            match = _FACTOR_KEY.fullmatch(tensor.key)
            if not match or not _is_served(match, paths):
                _refuse_stray(tensor.key, config, file)
            factors.setdefault(match["path"], {})[match["factor"]] = tensor
            adapters.add(match["adapter"])
        if not factors:
            raise AdapterError(
                f"{file}: no LoRA matrices in it. Train with target_modules among "
                f"{', '.join(LAYER_MODULES + OUTER_MODULES)}, and save with save_pretrained"
            )
        if len(adapters) > 1:
            raise AdapterError(
                f"{file}: tensors of several adapters ({', '.join(sorted(map(str, adapters)))}). "
                "Save one with save_pretrained(..., selected_adapters=[name])"
            )
        return cls(file=file, factors=factors, base_copies=base_copies)


class Place(NamedTuple):
    """Where a module is: its layer, or None outside the layers, and its name there."""

    layer: int | None
    module: str


def module_paths(config: ModelConfig) -> dict[str, Place]:
    """All modules that an adapter may adapt, by their path in Hugging Face's Llama."""
    return {
        "model.embed_tokens": Place(None, "embed_tokens"),
        "lm_head": Place(None, "lm_head"),
    } | {
        f"model.layers.{layer}.{_BLOCKS[module]}.{module}": Place(layer, module)
        for layer in range(config.num_hidden_layers)
        for module in LAYER_MODULES
    }


def _is_served(match: re.Match[str], paths: Mapping[str, Place]) -> bool:
    """Whether the base has the module, and its factors are named for what it is."""
    place = paths.get(match["path"])
    return place is not None and bool(match["embedding"]) == (place.module == "embed_tokens")


def _load(content: bytes, file: Path) -> list[Tensor]:
    """The tensors in order of their names, so that of several faults always the same is told."""
    header = int.from_bytes(content[:8], "little")
    if len(content) >= 8 and MOST_HEADER < header <= len(content):
        raise AdapterError(
            f"{file}: its header has {header} bytes, more than {MOST_HEADER}. "
            "Save the adapter with save_pretrained"
        )
    try:
        stored = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise AdapterError(
            f"{file}: not a whole safetensors file ({error}). "
            "It may be truncated or a Git LFS pointer: copy or download it again"
        ) from error
    entries = cast(list[tuple[str, dict[str, Any]]], stored)  # the stub has no return type
    return [
        Tensor(key, _array(key, entry, file)) for key, entry in sorted(entries, key=itemgetter(0))
    ]


def _array(key: str, entry: Mapping[str, Any], file: Path) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if len(key) > _LONGEST_KEY:
        raise AdapterError(
            f"{file}: {key[:_LONGEST_KEY]}… is longer than a tensor's name may be. "
            "Save the adapter with save_pretrained"
        )
    if dtype is None:
        raise AdapterError(
            f"{file}: {key} has the dtype {entry['dtype']}. "
            "Save the adapter in float32, float16 or bfloat16"
        )
    try:
        array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    except ValueError as error:  # more dimensions than NumPy has
        raise AdapterError(f"{file}: {key} is no matrix ({error}). Save it again") from error
    if dtype is np.float64:  # as it was trained by mistake: no device computes in it
        with np.errstate(over="ignore"):  # infinity is refused later
            array = array.astype(np.float32)
    array.flags.writeable = False
    return array


def _refuse_stray(key: str, config: ModelConfig, file: Path) -> NoReturn:
    layer = re.match(r"base_model\.model\.model\.layers\.([0-9]+)\.", key)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        raise AdapterError(
            f"{file}: {key} is of layer {layer[1]}, but the base has {config.num_hidden_layers} "
            "layers. Serve the adapter with the base it was trained on"
        )
    reason = next(reason for pattern, reason in _STRAYS if re.search(pattern, key))
    raise AdapterError(f"{file}: {key} {reason}")
