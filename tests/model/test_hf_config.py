# SPDX-License-Identifier: Apache-2.0
"""Every field of `config.json` is understood, harmless, or refused by a message that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from slora_jax.config import Llama3Rope, ModelConfig
from slora_jax.hf_config import ModelConfigError, read_model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_ROPE = Llama3Rope(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def write(model_dir: Path, *, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes LLAMA with `changes`; an ellipsis deletes the field."""
    fields = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    (model_dir / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (model_dir / "generation_config.json").write_text(json.dumps(generation))
    return model_dir


def read(model_dir: Path, **changes: Any) -> ModelConfig:
    return read_model_config(write(model_dir, **changes))


def test_llama_2_7b(tmp_path):
    assert read(tmp_path) == ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        torch_dtype="float16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_gqa_biases_tied_embedding_and_explicit_head_dim(tmp_path):
    config = read(
        tmp_path,
        num_key_value_heads=8,
        head_dim=96,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    assert (config.num_key_value_heads, config.head_dim) == (8, 96)
    assert config.attention_bias
    assert config.mlp_bias
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_SCALING}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3_SCALING},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING},
        },
    ],
    ids=["rope_type", "legacy type", "rope_parameters", "all of them, agreeing"],
)
def test_llama3_rope(tmp_path, fields):
    config = read(tmp_path, **fields)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, LLAMA3_ROPE)


def test_default_rope(tmp_path):
    config = read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling': rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_parameters': rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "'llama3' and 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "required field 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "default", "beta": 1}}, "unknown field 'beta'"),
        ({"rope_scaling": "llama3"}, "'rope_scaling' must be dict"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' is 0.5",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "contradict each other"),
        (
            {
                "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING},
                "rope_parameters": {"rope_type": "default"},
            },
            "contradict each other",
        ),
        ({"rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "factor": 0}}, "must be positive"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "low_freq_factor": 4.0}},
            "less than high_freq_factor 4.0",
        ),
        ({"rope_theta": 0}, "rope_theta must be positive"),
    ],
)
def test_refuses_rope(tmp_path, fields, message):
    with pytest.raises(ModelConfigError, match=message):
        read(tmp_path, **fields)


OPTIONAL = {"architectures", "hidden_act", "torch_dtype", "bos_token_id", "eos_token_id"}


@pytest.mark.parametrize("name", sorted(set(LLAMA) - OPTIONAL))
@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
def test_required_fields_are_named(tmp_path, name, absent):
    with pytest.raises(ModelConfigError, match=f"config.json: required field '{name}' is missing"):
        read(tmp_path, **{name: absent})


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_optional_fields_may_be_absent(tmp_path, name):
    assert read(tmp_path, **{name: ...}).vocab_size == 32000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "mistral", "model_type 'mistral' is not supported"),
        ("architectures", ["LlamaForSequenceClassification"], "SequenceClassification.* not supp"),
        ("hidden_act", "gelu", "'hidden_act' is 'gelu', not supported: only the SiLU"),
        ("partial_rotary_factor", 0.5, "'partial_rotary_factor' is 0.5, not supported"),
        ("sliding_window", 4096, "'sliding_window' is 4096, not supported"),
        ("attn_logit_softcapping", 50.0, "'attn_logit_softcapping' is 50.0, not supported"),
        ("final_logit_softcapping", 30.0, "'final_logit_softcapping' is 30.0, not supported"),
        ("quantization_config", {"bits": 4}, "'quantization_config' is .*bits.*use a checkpoint"),
        ("compression_config", {"format": "x"}, "'compression_config' is .* use a checkpoint"),
        ("pruned_heads", {"0": [1]}, "'pruned_heads' is .* not supported"),
        ("per_layer_config", {"0": {}}, "'per_layer_config' is .* not supported"),
        ("add_cross_attention", True, "'add_cross_attention' is True, not supported"),
        ("is_encoder_decoder", True, "'is_encoder_decoder' is True, not supported"),
        ("auto_map", {"AutoModel": "m.M"}, "'auto_map' is .* code that comes with a checkpoint"),
        ("use_flux", 1, r"config.json: unknown field 'use_flux' \(1\) might .*delete it"),
        ("qk_norm", True, "unknown field 'qk_norm'"),
        ("torch_dtype", "float8_e4m3fn", "dtype 'float8_e4m3fn' is not supported, only float32"),
        ("dtype", "bfloat16", "'dtype' bfloat16 and 'torch_dtype' float16 contradict"),
        ("vocab_size", "32000", "'vocab_size' must be int, not '32000'"),
        ("hidden_size", 4096.0, "'hidden_size' must be int, not 4096.0"),
        ("num_hidden_layers", True, "'num_hidden_layers' must be int, not True"),
        ("attention_bias", 1, "'attention_bias' must be bool, not 1"),
        ("rms_norm_eps", "1e-5", "'rms_norm_eps' must be int or float"),
        ("eos_token_id", "</s>", "'eos_token_id' must be int or list"),
        ("eos_token_id", [2, "x"], "'eos_token_id' must be an integer or a list of them"),
        ("num_attention_heads", 24, "hidden_size 4096 is not a multiple .* state 'head_dim'"),
        ("num_attention_heads", 0, "not a multiple of num_attention_heads 0"),
        ("num_key_value_heads", 5, "32 is not a multiple of num_key_value_heads 5"),
        ("head_dim", 127, "head_dim 127 must be even"),
        ("eos_token_id", -1, "eos_token_id -1 must not be negative"),
    ],
)
def test_refuses(tmp_path, name, value, message):
    with pytest.raises(ModelConfigError, match=message):
        read(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_positive(tmp_path, name, value):
    with pytest.raises(
        ModelConfigError, match=f"config.json: {name} must be positive, not {value}"
    ):
        read(tmp_path, **{name: value})


def test_ignores_what_is_known_or_off(tmp_path):
    expected = read(tmp_path)
    assert expected == read(
        tmp_path,
        initializer_range=0.02,
        use_cache=True,
        attention_dropout=0.1,
        pretraining_tp=2,
        transformers_version="4.31.0",
        _name_or_path="somewhere",
        pad_token_id=0,
        id2label={"0": "LABEL_0"},
        temperature=0.9,
        sliding_window=None,
        quantization_config=None,
        partial_rotary_factor=1.0,
        pruned_heads={},
        rope_interleaved=False,
        never_heard_of=None,
    )


def test_reads_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_SCALING}
    sizes = {name: LLAMA[name] for name in LLAMA if name.endswith("_size") or "num_" in name}
    written = transformers.LlamaConfig(
        **sizes,
        num_key_value_heads=8,
        rope_parameters=rope,
        max_position_embeddings=131072,
        dtype="bfloat16",
        eos_token_id=[128001, 128008],
    )
    (tmp_path / "config.json").write_text(written.to_json_string(use_diff=False))
    config = read_model_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, LLAMA3_ROPE)
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)
    assert (config.torch_dtype, config.eos_token_ids) == ("bfloat16", (128001, 128008))


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        (None, None, ()),
        ([128001, 128009], {"eos_token_id": [128008, 128001]}, (128001, 128009, 128008)),
        (2, {"temperature": 0.6, "unknown": 1}, (2,)),
        (2, {"eos_token_id": 7}, (2, 7)),
    ],
)
def test_end_of_sequence_tokens(tmp_path, own, generation, expected):
    assert read(tmp_path, eos_token_id=own, generation=generation).eos_token_ids == expected


def test_bad_generation_config_is_named(tmp_path):
    with pytest.raises(ModelConfigError, match=r"generation_config.json: 'eos_token_id' must be"):
        read(tmp_path, generation={"eos_token_id": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*config.json: No such file"),
        ("{", "config.json is not valid JSON"),
        ("\xff", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object, not list"),
    ],
)
def test_unreadable(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelConfigError, match=message):
        read_model_config(tmp_path)
