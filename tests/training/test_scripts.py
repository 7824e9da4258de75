# SPDX-License-Identifier: Apache-2.0
"""Smoke tests of the training scripts: losses fall, and what they write loads."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from slora_jax.demo.tasks import TASKS, held_out_prompts, is_held_out, sample_words, training_text
from training import train_adapters, train_base
from training.adapter_specs import ADAPTERS
from training.batches import BEGIN, END, SEP, encode_pairs
from training.dense_llama import LlamaConfig

STEPS = 20


# Training is no part of serving: its tests are long. The others are of what it shares with serving.
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The output directory and losses of a short base training."""
    output = tmp_path_factory.mktemp("base")
    # Compilation takes most of the time: one layer is enough.
    argv = f"--steps {STEPS} --num-layers 1 --max-length 8 --batch-size 8 --held-out 16"
    return output, train_base.main([*argv.split(), "--output", str(output)])


def assert_loss_falls(losses: list[float]) -> None:
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@LONG
def test_base_training_reduces_the_loss(base_run: tuple[Path, list[float]]) -> None:
    assert_loss_falls(base_run[1])


@LONG
def test_base_checkpoint_has_hugging_face_names_and_shapes(
    base_run: tuple[Path, list[float]],
) -> None:
    directory = base_run[0]
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    embed, ffn = config["hidden_size"], config["intermediate_size"]
    q_dim = config["num_attention_heads"] * config["head_dim"]
    kv_dim = config["num_key_value_heads"] * config["head_dim"]
    layer_shapes = {
        "input_layernorm": (embed,),
        "mlp.down_proj": (embed, ffn),
        "mlp.gate_proj": (ffn, embed),
        "mlp.up_proj": (ffn, embed),
        "post_attention_layernorm": (embed,),
        "self_attn.k_proj": (kv_dim, embed),
        "self_attn.o_proj": (embed, q_dim),
        "self_attn.q_proj": (q_dim, embed),
        "self_attn.v_proj": (kv_dim, embed),
    }
    expected = {
        f"model.layers.{layer}.{module}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for module, shape in layer_shapes.items()
    }
    expected["model.norm.weight"] = (embed,)
    expected["model.embed_tokens.weight"] = expected["lm_head.weight"] = (
        config["vocab_size"],
        embed,
    )
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in tensors.values())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == END


@pytest.mark.long
@LONG
def test_adapter_training(base_run: tuple[Path, list[float]], tmp_path: Path) -> None:
    argv = f"--tasks title --steps {STEPS} --batch-size 8 --held-out 16 --base {base_run[0]}"
    losses = train_adapters.main([*argv.split(), "--output", str(tmp_path)])
    assert_loss_falls(losses["title"])

    spec = ADAPTERS["title"]
    config = json.loads((tmp_path / "title" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == spec.r
    tensors = load_file(tmp_path / "title" / "adapter_model.safetensors")
    modules = spec.modules(LlamaConfig(num_hidden_layers=1))
    assert len(tensors) == 2 * len(modules)
    for module, (out_features, in_features) in modules.items():
        key = f"base_model.model.{module}"
        rank = spec.rank(module)
        assert tensors[f"{key}.lora_A.weight"].shape == (rank, in_features)
        assert tensors[f"{key}.lora_B.weight"].shape == (out_features, rank)
        assert tensors[f"{key}.lora_B.weight"].any()


def test_rank_and_alpha_patterns_follow_peft() -> None:
    title = ADAPTERS["title"]
    assert title.rank("model.layers.2.self_attn.v_proj") == 16
    assert title.scale("model.layers.2.self_attn.v_proj") == 24 / 16
    assert title.rank("model.layers.0.mlp.down_proj") == 5
    assert title.rank("model.layers.1.mlp.down_proj") == 8
    assert title.scale("model.layers.1.mlp.down_proj") == 2.0
    double = ADAPTERS["double"]
    assert double.use_rslora
    assert double.scale("model.layers.0.mlp.up_proj") == pytest.approx(12 / 32**0.5)


@LONG
def test_tokenizer(base_run: tuple[Path, list[float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_run[0])
    text = "Hé llo,  日本 🚀\n\t<b> \x00"
    byte_ids = tokenizer.encode(text, add_special_tokens=False)
    assert byte_ids == list(text.encode())
    assert tokenizer.decode(byte_ids) == text

    prompt_ids = tokenizer.encode(text)
    assert prompt_ids == [BEGIN, *byte_ids, SEP]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert tokenizer.encode(chat, add_special_tokens=False) == prompt_ids
    assert tokenizer.eos_token_id == END


@LONG
def test_tokenizer_has_every_byte(base_run: tuple[Path, list[float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_run[0])
    every_character = "".join(chr(code) for code in range(0x800)) + "\u4e2d\U0001f680"
    ids = tokenizer.encode(every_character, add_special_tokens=False)
    assert ids == list(every_character.encode())
    assert len(tokenizer) == 260


def test_answer_mask_covers_answer_and_end() -> None:
    batch = encode_pairs([("ab", "xyz")], tokens=9)
    masked = batch.targets_BT[batch.answer_mask_BT]
    np.testing.assert_array_equal(masked, [*b"xyz", END])
    # The first answer token is predicted from the separator.
    assert batch.inputs_BT[batch.answer_mask_BT][0] == SEP


def test_training_and_held_out_texts_are_disjoint() -> None:
    prompts = held_out_prompts(seed=1, n=200)
    assert prompts == held_out_prompts(seed=1, n=200)
    assert len(set(prompts)) == 200
    assert all(is_held_out(p) and 4 <= len(p) <= 20 and p == p.strip() for p in prompts)
    rng = random.Random(0)
    assert not any(is_held_out(training_text(rng, sample_words)) for _ in range(500))


def test_tasks_match_adapters_and_transform() -> None:
    assert list(TASKS) == list(ADAPTERS)
    assert {name: task.transform("hello cat") for name, task in TASKS.items()} == {
        "upper": "HELLO CAT",
        "rot13": "uryyb png",
        "leet": "h3ll0 c47",
        "no_vowels": "hll ct",
        "title": "Hello Cat",
        "snake_case": "hello_cat",
        "stars": "h*ll* c*t",
        "reverse_words": "olleh tac",
        "exclaim": "hello cat!",
        "double": "hheelllloo  ccaatt",
        "initials": "hc",
    }
