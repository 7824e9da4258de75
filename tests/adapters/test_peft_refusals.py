# SPDX-License-Identifier: Apache-2.0
"""What cannot be served faithfully is refused: the message names it, the file and the remedy."""

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from slora_jax.adapters import peft_config
from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.peft import read_adapter
from tests.adapters.make import BASE, DTYPES, edit_config, edit_tensors, write_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
EMBED = "base_model.model.model.embed_tokens"


def refusal(directory: Path, **kwargs: Any) -> str:
    with pytest.raises(AdapterError) as error:
        read_adapter(directory, BASE, **kwargs)
    return str(error.value)


CHANGED_BASE = "without conversion"
REFUSED_FIELDS = [
    ("peft_type", "ADALORA", ["only LoRA"]),
    ("peft_type", ..., ["None", "only LoRA"]),
    ("r", ..., ["r is missing"]),
    ("lora_alpha", ..., ["lora_alpha is missing"]),
    ("r", "8", ["r = '8'", "positive integer"]),
    ("r", 0, ["r = 0", "positive integer"]),
    ("r", 8.0, ["r = 8.0", "positive integer"]),
    ("r", True, ["r = True", "positive integer"]),
    ("lora_alpha", "16", ["lora_alpha = '16'", "finite number"]),
    ("lora_alpha", None, ["lora_alpha = None", "finite number"]),
    ("lora_alpha", False, ["lora_alpha = False", "finite number"]),
    ("lora_alpha", math.nan, ["lora_alpha = nan", "finite number"]),
    ("lora_alpha", 10**400, ["lora_alpha", "finite number"]),
    ("use_rslora", "true", ["use_rslora = 'true'", "neither true nor false"]),
    ("rank_pattern", [1], ["rank_pattern", "not an object"]),
    ("rank_pattern", {"q_proj": 0}, ["rank_pattern['q_proj'] = 0", "positive integer"]),
    ("alpha_pattern", {"q_proj": "x"}, ["alpha_pattern['q_proj'] = 'x'", "finite number"]),
    ("alpha_pattern", {"(q_proj": 1}, ["alpha_pattern", "'(q_proj'", "regular expression"]),
    ("use_dora", True, ["use_dora=False"]),
    ("alora_invocation_tokens", [1, 2], ["aLoRA"]),
    ("lora_bias", True, ["lora_bias=False"]),
    ("bias", "all", ['bias="none"']),
    ("bias", "lora_only", ['bias="none"']),
    ("modules_to_save", ["lm_head"], ["target_modules"]),
    ("trainable_token_indices", [0], ["embed_tokens"]),
    ("target_parameters", ["mlp.experts.gate_up_proj"], ["target_modules"]),
    ("layer_replication", [[0, 2], [1, 3]], ["layer_replication"]),
    ("megatron_config", {"tp": 2}, ["Megatron"]),
    ("use_qalora", True, ["use_qalora=False"]),
    ("use_bdlora", {"nblocks": 2}, ["block-diagonal"]),
    ("arrow_config", {"top_k": 3}, ["Arrow"]),
    ("kasa_config", {"beta": 1e-4}, ["KaSA"]),
    ("velora_config", {"num_groups": 64}, ["VeLoRA"]),
    ("monteclora_config", {"num_samples": 8}, ["MonteCLoRA"]),
    ("use_tomorrow", True, ["not known", "null"]),
    ("tomorrow_scale", 0, ["not known", "null"]),
    ("init_lora_weights", "pissa", [CHANGED_BASE, "path_initial_model_for_weight_conversion"]),
    ("init_lora_weights", "PiSSA", [CHANGED_BASE, "path_initial_model_for_weight_conversion"]),
    ("init_lora_weights", "pissa_niter_16", [CHANGED_BASE, "path_initial_model_for_weight"]),
    ("init_lora_weights", "olora", [CHANGED_BASE, "path_initial_model_for_weight_conversion"]),
    ("init_lora_weights", "corda", [CHANGED_BASE, "path_initial_model_for_weight_conversion"]),
    ("init_lora_weights", "lora_ga", [CHANGED_BASE, "path_initial_model_for_weight_conversion"]),
    ("init_lora_weights", "loftq", [CHANGED_BASE, "init_lora_weights=True"]),
    ("init_lora_weights", "tomorrow", [CHANGED_BASE, "init_lora_weights=True"]),
    ("init_lora_weights", 3, [CHANGED_BASE, "init_lora_weights=True"]),
]


@pytest.mark.parametrize(("field", "value", "parts"), REFUSED_FIELDS)
def test_refused_field(tmp_path: Path, field: str, value: object, parts: list[str]):
    write_adapter(tmp_path, BASE)
    edit_config(tmp_path, **{field: value})
    message = refusal(tmp_path)
    for part in (str(tmp_path / "adapter_config.json"), field, *parts):
        assert part in message


def test_all_refused_fields_are_tested():
    assert set(peft_config.REFUSED_FIELDS) <= {field for field, _, _ in REFUSED_FIELDS}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
    ],
)
def test_damaged_config(tmp_path: Path, content: bytes, part: str):
    write_adapter(tmp_path, BASE)
    (tmp_path / "adapter_config.json").write_bytes(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'adapter_config.json'}: {part}" in message
    assert "Save the adapter again" in message


def test_no_directory(tmp_path: Path):
    assert "no such directory" in refusal(tmp_path / "absent")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    assert "no such directory" in refusal(tmp_path / "dangling")
    write_adapter(tmp_path, BASE)
    assert "on this machine that holds" in refusal(tmp_path / "adapter_model.safetensors")


def test_symlinks_are_followed(tmp_path: Path):
    path = write_adapter(tmp_path / "target", BASE)
    (tmp_path / "link").symlink_to(path)
    assert read_adapter(tmp_path / "link", BASE).name == "link"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(tmp_path: Path, file: str):
    write_adapter(tmp_path, BASE)
    (tmp_path / file).unlink()
    message = refusal(tmp_path)
    assert f"{tmp_path / file}: no such file" in message
    assert "save_pretrained" in message
    (tmp_path / file).mkdir()
    assert f"{tmp_path / file}: is a directory, not a file" in refusal(tmp_path)


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_with_a_command(tmp_path: Path, pickle: str):
    path = write_adapter(tmp_path / "it's here", BASE)
    (path / "adapter_model.safetensors").rename(path / pickle)
    _, _, command = refusal(path).partition("with: ")
    python, option, code, source, target = shlex.split(command)
    assert (python, option) == ("python", "-c")
    compile(code, "<command>", "exec")
    assert (source, target) == (str(path / pickle), str(path / "adapter_model.safetensors"))
    assert "weights_only=True" in code


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"\xff" + content[1:],
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_damaged_tensors(tmp_path: Path, damage: Callable[[bytes], bytes]):
    write_adapter(tmp_path, BASE)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(tmp_path)
    assert f"{file}: not a whole safetensors file" in message
    assert "download it again" in message


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


LAYER = "base_model.model.model.layers"
REFUSED_TENSORS = [
    (f"{Q0}.lora_magnitude_vector", zeros(64), ["use_dora=False"]),
    (f"{Q0}.lora_B.bias", zeros(64), ["lora_bias=False"]),
    (f"{Q0}.lora_B.default.bias", zeros(64), ["lora_bias=False"]),
    (f"{Q0}.base_layer.bias", zeros(64), ['bias="none"']),
    (f"{Q0}.lora_diag", zeros(8), ["KaSA"]),
    (f"{Q0}.base_layer.weight", zeros(64, 32), ["weight of the base"]),
    (f"{EMBED}.token_adapter.trainable_tokens_delta", zeros(1, 32), ["embed_tokens"]),
    (f"{EMBED}.base_layer.weight", zeros(96, 32), ["save_embedding_layers=False"]),
    (f"{EMBED}.weight", zeros(99, 32), ["save_embedding_layers=False"]),
    ("base_model.model.lm_head.weight", zeros(96, 32), ["save_embedding_layers=False"]),
    ("base_model.model.lm_head.base_layer.weight", zeros(96, 32), ["save_embedding_layers=False"]),
    (f"{EMBED}.lora_A.weight", zeros(8, 96), ["target_modules"]),
    ("base_model.model.lm_head.lora_embedding_A", zeros(8, 32), ["target_modules"]),
    (f"{LAYER}.0.mlp.experts.lora_A.weight", zeros(8, 32), ["mixture of experts"]),
    (f"{LAYER}.0.mlp.q_proj.lora_A.weight", zeros(8, 32), ["target_modules among q_proj"]),
    ("base_model.model.model.embed_positions.lora_A.weight", zeros(8, 32), ["embed_tokens"]),
    (f"{LAYER}.3.self_attn.q_proj.lora_A.weight", zeros(8, 32), ["layer 3", "3 layers"]),
    (f"{LAYER}.00.self_attn.q_proj.lora_A.weight", zeros(8, 32), ["target_modules"]),
    ("base_model.model.score.weight", zeros(2, 32), ["modules_to_save"]),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", zeros(8, 32), ["lacks base_model.model."]),
    ("base_model.model._orig_mod.lm_head.lora_A.weight", zeros(8, 32), ["torch.compile"]),
    ("_orig_mod.base_model.model.lm_head.lora_A.weight", zeros(8, 32), ["torch.compile"]),
    ("base_model.model.module.lm_head.lora_A.weight", zeros(8, 32), ["DistributedDataParallel"]),
    ("module.base_model.model.lm_head.lora_A.weight", zeros(8, 32), ["DistributedDataParallel"]),
    (f"{LAYER}.0.mlp.up_proj.lora_A.weight", zeros(8, 32), ["no B beside it"]),
    (f"{LAYER}.0.mlp.up_proj.lora_B.weight", zeros(48, 8), ["no A beside it"]),
    (f"{Q0}.lora_A.other.weight", zeros(8, 32), ["several adapters", "selected_adapters"]),
    (Q0_A, zeros(8, 33), ["[8, 33]", "expected [8, 32]", "base it was trained on"]),
    (Q0_B, zeros(32, 8), ["[32, 8]", "expected [64, 8]", "base it was trained on"]),
    (Q0_B, zeros(64, 4), ["[64, 4]", "expected [64, 8]"]),
    (Q0_A, zeros(256), ["[256]", "expected [8, 32]", "ZeRO-3"]),
    (Q0_A, zeros(0), ["[0]", "expected [8, 32]", "ZeRO-3"]),
    (Q0_A, zeros(0, 32), ["[0, 32]", "expected [8, 32]", "ZeRO-3"]),
    (Q0_A, np.full((8, 32), np.nan, np.float32), ["NaN or infinity", "checkpoint"]),
    (Q0_B, np.full((64, 8), -np.inf, np.float16), ["NaN or infinity", "checkpoint"]),
    (Q0_B, np.full((64, 8), np.nan, ml_dtypes.bfloat16), ["NaN or infinity", "checkpoint"]),
    (Q0_A, zeros(8, 32, dtype=np.int8), ["dtype I8", "float32, float16 or bfloat16"]),
    (Q0_A, np.full((8, 32), 1e300), ["NaN or infinity"]),  # not of float32
]


@pytest.mark.parametrize(("key", "tensor", "parts"), REFUSED_TENSORS)
def test_refused_tensor(tmp_path: Path, key: str, tensor: np.ndarray, parts: list[str]):
    write_adapter(tmp_path, BASE)
    edit_tensors(tmp_path, **{key: tensor})
    message = refusal(tmp_path)
    # The adapter's name in a key is told by itself.
    name = "other" if ".other." in key else key
    for part in (str(tmp_path / "adapter_model.safetensors"), name, *parts):
        assert part in message


def test_no_lora_at_all(tmp_path: Path):
    write_adapter(tmp_path, BASE, modules=())
    message = refusal(tmp_path)
    assert str(tmp_path / "adapter_model.safetensors") in message
    assert "no LoRA matrices" in message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"r": 4}, "r = 4"),
        ({"rank_pattern": {"q_proj": 16}}, "rank_pattern['q_proj'] = 16"),
    ],
)
def test_rank_of_tensors_is_that_of_the_config(tmp_path: Path, fields: dict[str, Any], field: str):
    write_adapter(tmp_path, BASE, rank=8, **fields)
    edit_config(tmp_path, **fields)
    message = refusal(tmp_path)
    for part in ("adapter_model.safetensors", "q_proj", "rank 8", field, "adapter_config.json"):
        assert part in message


def test_rank_above_the_limit(tmp_path: Path):
    write_adapter(
        tmp_path, BASE, rank_of=lambda path: 9 if path.endswith("1.self_attn.v_proj") else 8
    )
    read_adapter(tmp_path, BASE, max_rank=9)
    message = refusal(tmp_path, max_rank=8)
    for part in ("model.layers.1.self_attn.v_proj", "rank 9", "max_lora_rank = 8", "9 or more"):
        assert part in message


@pytest.mark.parametrize(
    ("copy_dtype", "base_dtype"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
def test_equal_copies_are_accepted(tmp_path: Path, copy_dtype: str, base_dtype: str):
    write_adapter(tmp_path, BASE, modules=("embed_tokens",))
    weight = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    copies = {f"{EMBED}.base_layer.weight": weight.astype(DTYPES[copy_dtype])}
    edit_tensors(tmp_path, **copies)
    adapter = read_adapter(tmp_path, BASE, base_weight=lambda _: weight.astype(DTYPES[base_dtype]))
    assert list(adapter.outer) == ["embed_tokens"]


@pytest.mark.parametrize("vocab", [96, 100])
def test_other_copies_are_refused(tmp_path: Path, vocab: int):
    write_adapter(tmp_path, BASE, modules=("lm_head",))
    key = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(tmp_path, **{key: np.ones((vocab, 32), np.float32)})
    message = refusal(tmp_path, base_weight=lambda module: np.zeros((96, 32), np.float32))
    for part in (key, "differs", "save_embedding_layers=False"):
        assert part in message


TIED = dataclasses.replace(BASE, tie_word_embeddings=True)


def write_tied(directory: Path) -> None:
    """What PEFT saves with `ensure_weight_tying`: one pair of matrices, for both uses."""
    modules = ("embed_tokens", "lm_head")
    write_adapter(directory, TIED, modules=modules, ensure_weight_tying=True)
    head = "base_model.model.lm_head"
    embed = load_file(directory / "adapter_model.safetensors")
    pair = {
        f"{head}.lora_A.weight": embed[f"{EMBED}.lora_embedding_B"].T.copy(),
        f"{head}.lora_B.weight": embed[f"{EMBED}.lora_embedding_A"].T.copy(),
    }
    edit_tensors(directory, **pair)


def test_a_tied_pair_is_accepted(tmp_path: Path):
    write_tied(tmp_path)
    assert set(read_adapter(tmp_path, TIED).outer) == {"embed_tokens", "lm_head"}


@pytest.mark.parametrize("value", [None, np.ones((BASE.vocab_size, 8), np.float32)])
def test_a_tied_pair_that_differs_or_is_half_missing(tmp_path: Path, value: np.ndarray | None):
    write_tied(tmp_path)
    edit_tensors(tmp_path, **{"base_model.model.lm_head.lora_B.weight": value})
    if value is None:
        edit_tensors(tmp_path, **{"base_model.model.lm_head.lora_A.weight": value})
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        read_adapter(tmp_path, TIED)
