# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face's `config.json` of a Llama, and refuses what would change the result.

A field that is ignored by mistake serves a wrong model under the right name. So every field is
understood, known to be without effect on the forward pass, or refused by name.
"""

import json
from pathlib import Path
from typing import Any, Literal, cast

from slora_jax.config import Llama3Rope, ModelConfig


class ModelConfigError(ValueError):
    """A `config.json` is malformed, or describes a model that this engine does not implement."""


# What else than the neutral value means a different model: field -> (neutral value, what to know).
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "hidden_act": ("silu", "only the SiLU-gated MLP is implemented"),
    "partial_rotary_factor": (1, "rotary embedding is applied to whole heads only"),
    "sliding_window": (None, "attention is over the whole context only"),
    "attn_logit_softcapping": (None, "attention logits are never capped"),
    "final_logit_softcapping": (None, "logits are never capped"),
    "quantization_config": (None, "use a checkpoint in float32, float16 or bfloat16"),
    "compression_config": (None, "use a checkpoint in float32, float16 or bfloat16"),
    "pruned_heads": ({}, "every layer has all of its heads"),
    "per_layer_config": (None, "all layers have one shape"),
    "add_cross_attention": (False, "only decoders are implemented"),
    "is_encoder_decoder": (False, "only decoders are implemented"),
    "auto_map": (None, "code that comes with a checkpoint is never run"),
}

# Training, bookkeeping, and sampling defaults that a request states for itself. The names of the
# last two lines were left in published checkpoints by other tools.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path _commit_hash transformers_version tokenizer_class name_or_path
    initializer_range attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop
    gradient_checkpointing pretraining_tp use_cache
    attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
    _attn_implementation_internal _experts_implementation_internal
    pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    is_decoder torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder
    cross_attention_hidden_size chunk_size_feed_forward
    return_dict output_attentions output_hidden_states
    finetuning_task task_specific_params problem_type id2label label2id num_labels prefix
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan
    is_llama_config transformers.js_config max_sequence_length
    unsloth_version unsloth_fixed
    """.split()  # noqa: SIM905  (a list would be 80 lines)
)

_DTYPES = ("float32", "float16", "bfloat16")
_MISSING = object()


def read_model_config(model_dir: Path) -> ModelConfig:
    """Parses `config.json`, and `generation_config.json` for further end-of-sequence tokens.

    Args:
        model_dir: the directory of a Llama 1, 2 or 3.x checkpoint.

    Raises:
        ModelConfigError: a file is missing or malformed, or names what is not implemented.
    """
    path = model_dir / "config.json"
    fields = _read_fields(path)
    _refuse_other_models(fields)
    rope_theta, rope_scaling = _read_rope(fields)
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    values: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": _read_head_dim(fields, hidden_size, heads),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
        "attention_bias": fields.boolean("attention_bias"),
        "mlp_bias": fields.boolean("mlp_bias"),
        "torch_dtype": _read_dtype(fields),
        "bos_token_id": fields.take("bos_token_id", (int,), None),
        "eos_token_ids": _read_eos(fields, model_dir / "generation_config.json"),
    }
    fields.refuse_the_rest()
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ModelConfigError(f"{path}: {error}") from error


class _Fields:
    """Typed access to one JSON object, which remembers what has been read.

    A null is the same as an absent field, as it is to transformers.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values = values
        self._unread = set(values)
        self.where = where

    def take(self, name: str, kinds: tuple[type, ...], default: Any = _MISSING) -> Any:
        """Reads a field; bool counts as an int only where `kinds` says so."""
        self._unread.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is _MISSING:
                raise ModelConfigError(f"{self.where}: required field '{name}' is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ModelConfigError(f"{self.where}: '{name}' must be {expected}, not {value!r}")
        return value

    def integer(self, name: str, default: Any = _MISSING) -> int:
        return self.take(name, (int,), default)

    def number(self, name: str, default: Any = _MISSING) -> float:
        return float(self.take(name, (int, float), default))

    def boolean(self, name: str) -> bool:
        return self.take(name, (bool,), False)

    def section(self, name: str) -> "_Fields | None":
        """A nested object, or None where it is absent."""
        values = self.take(name, (dict,), None)
        return None if values is None else _Fields(values, f"{self.where}, '{name}'")

    def refuse_the_rest(self) -> None:
        """Refuses the fields that nobody has read, unless they are known or off (null, false)."""
        for name, value in self._values.items():
            if name not in self._unread or value is None or value is False:
                continue
            if name in _UNSUPPORTED:
                neutral, advice = _UNSUPPORTED[name]
                if value != neutral:
                    raise ModelConfigError(
                        f"{self.where}: '{name}' is {_shorten(value)}, not supported: {advice}"
                    )
            elif name not in _WITHOUT_EFFECT:
                raise ModelConfigError(
                    f"{self.where}: unknown field '{name}' ({_shorten(value)}) might change the "
                    f"model's output; delete it from the file if you know that it does not"
                )


def _read_fields(path: Path) -> _Fields:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelConfigError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return _Fields(values, str(path))


def _refuse_other_models(fields: _Fields) -> None:
    model_type = fields.take("model_type", (str,))
    if model_type != "llama":
        raise ModelConfigError(
            f"{fields.where}: model_type '{model_type}' is not supported, only 'llama' is"
        )
    architectures = fields.take("architectures", (list,), ["LlamaForCausalLM"])
    if architectures != ["LlamaForCausalLM"]:
        raise ModelConfigError(
            f"{fields.where}: architectures {architectures} is not supported, "
            f"only ['LlamaForCausalLM'] is"
        )


def _read_head_dim(fields: _Fields, hidden_size: int, heads: int) -> int:
    head_dim = fields.take("head_dim", (int,), None)
    if head_dim is not None:
        return head_dim
    if heads < 1 or hidden_size % heads:
        raise ModelConfigError(
            f"{fields.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{heads}; state 'head_dim' if heads do not divide it"
        )
    return hidden_size // heads


def _read_rope(fields: _Fields) -> tuple[float, Llama3Rope | None]:
    """Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, or both."""
    sections = [fields.section(name) for name in ("rope_scaling", "rope_parameters")]
    present = [section for section in sections if section is not None]
    thetas = {source.take("rope_theta", (int, float), None) for source in (fields, *present)}
    thetas.discard(None)
    scalings = {_read_rope_scaling(section) for section in present}
    if len(thetas) > 1 or len(scalings) > 1:
        raise ModelConfigError(
            f"{fields.where}: 'rope_theta', 'rope_scaling' and 'rope_parameters' contradict each "
            f"other; keep one of them"
        )
    return float(next(iter(thetas), 10000.0)), next(iter(scalings), None)


def _read_rope_scaling(rope: _Fields) -> Llama3Rope | None:
    legacy = rope.take("type", (str,), None)  # its name before transformers 4.43
    rope_type = rope.take("rope_type", (str,), legacy or "default")
    if rope_type not in ("default", "llama3") or (legacy or rope_type) != rope_type:
        found = rope_type if legacy in (None, rope_type) else f"{rope_type}' and '{legacy}"
        raise ModelConfigError(
            f"{rope.where}: rope type '{found}' is not supported, only 'default' and 'llama3' are"
        )
    scaling = None
    if rope_type == "llama3":
        try:
            scaling = Llama3Rope(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
            )
        except ModelConfigError:
            raise
        except ValueError as error:
            raise ModelConfigError(f"{rope.where}: {error}") from error
    rope.refuse_the_rest()
    return scaling


def _read_dtype(fields: _Fields) -> Literal["float32", "float16", "bfloat16"]:
    """Reads `dtype`, or `torch_dtype` as it was called before transformers 4.56."""
    legacy = fields.take("torch_dtype", (str,), None)
    dtype = fields.take("dtype", (str,), legacy or "bfloat16")
    if legacy not in (None, dtype):
        raise ModelConfigError(
            f"{fields.where}: 'dtype' {dtype} and 'torch_dtype' {legacy} contradict; keep one"
        )
    if dtype not in _DTYPES:
        raise ModelConfigError(
            f"{fields.where}: dtype '{dtype}' is not supported, only {', '.join(_DTYPES)} are"
        )
    return cast(Literal["float32", "float16", "bfloat16"], dtype)


def _read_eos(fields: _Fields, generation_config: Path) -> tuple[int, ...]:
    """The union over both files; chat models often list the end of a turn in the second only."""
    sources = [fields]
    if generation_config.exists():
        sources.append(_read_fields(generation_config))
    found: list[int] = []
    for source in sources:
        value = source.take("eos_token_id", (int, list), [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ModelConfigError(
                f"{source.where}: 'eos_token_id' must be an integer or a list of them, not {ids}"
            )
        found.extend(ids)
    return tuple(dict.fromkeys(found))


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
