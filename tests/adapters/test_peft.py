# SPDX-License-Identifier: Apache-2.0
"""Adapters are read as PEFT means them: which projections, what scale, which identity."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import peft_config
from slora_jax.adapters.peft import read_adapter
from slora_jax.config import LAYER_MODULES, OUTER_MODULES
from tests.adapters.make import (
    BASE,
    DTYPES,
    PEFT_DEFAULTS,
    edit_config,
    edit_tensors,
    factor_keys,
    module_path,
    write_adapter,
)

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


def test_float64_is_read_as_float32(tmp_path: Path):
    """A trainer that forgot to cast: no device computes in it, and PEFT's base doesn't either."""
    write_adapter(tmp_path, BASE)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    edit_tensors(tmp_path, **{key: tensor.astype(np.float64) for key, tensor in stored.items()})
    pair = read_adapter(tmp_path, BASE).layers[0]["q_proj"]
    assert pair.a.dtype == pair.b.dtype == np.float32
    np.testing.assert_array_equal(pair.a, stored[Q0_A])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_as_stored(tmp_path: Path, dtype: str):
    modules = LAYER_MODULES + OUTER_MODULES
    write_adapter(tmp_path, BASE, rank=5, alpha=10, modules=modules, dtype=dtype)
    adapter = read_adapter(tmp_path, BASE)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(adapter.outer) == sorted(OUTER_MODULES)
    for layer, pairs in enumerate((*adapter.layers, adapter.outer)):
        for module, pair in pairs.items():
            a, b = factor_keys(module_path(module, layer))
            inputs, outputs = BASE.projection_shape(module)
            assert pair.a.shape == (5, inputs)
            assert pair.b.shape == (outputs, 5)
            assert pair.a.dtype == pair.b.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(pair.a, stored.pop(a))
            np.testing.assert_array_equal(pair.b, stored.pop(b))
            assert (pair.rank, pair.scale) == (5, 2.0)
            assert not pair.a.flags.writeable
    assert not stored


def test_keys_decide_which_projections_are_adapted(tmp_path: Path):
    write_adapter(
        tmp_path, BASE, modules=("down_proj", "k_proj"), layers=(1,), target_modules="all-linear"
    )
    edit_tensors(tmp_path, **dict.fromkeys(factor_keys(module_path("k_proj", 1))))
    edit_tensors(
        tmp_path, **{Q0_A: np.ones((8, 32), np.float32), Q0_B: np.ones((64, 8), np.float32)}
    )
    adapter = read_adapter(tmp_path, BASE)
    assert [sorted(pairs) for pairs in adapter.layers] == [["q_proj"], ["down_proj"], []]
    assert not adapter.outer


def test_name_path_and_max_rank(tmp_path: Path):
    path = write_adapter(tmp_path / "poet", BASE, rank_of=lambda path: 7 if "o_proj" in path else 3)
    adapter = read_adapter(str(path), BASE, max_rank=7)
    assert (adapter.name, adapter.path, adapter.max_rank) == ("poet", path, 7)
    assert read_adapter(path, BASE, name="bard").name == "bard"


def test_any_rank_from_one_up(tmp_path: Path):
    ranks = {module: rank for rank, module in enumerate(LAYER_MODULES, start=1)}
    write_adapter(
        tmp_path, BASE, modules=LAYER_MODULES, rank_of=lambda path: ranks[path.rpartition(".")[2]]
    )
    for pairs in read_adapter(tmp_path, BASE).layers:
        assert {module: pair.rank for module, pair in pairs.items()} == ranks


def test_adapter_name_in_keys(tmp_path: Path):
    write_adapter(tmp_path, BASE, modules=("q_proj", "embed_tokens"))
    expected = read_adapter(tmp_path, BASE)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {}
    for key, tensor in load_file(file).items():
        stem, weight, _ = key.partition(".weight")
        renamed[f"{stem}.default{weight}"] = tensor
    save_file(renamed, file)
    adapter = read_adapter(tmp_path, BASE)
    np.testing.assert_array_equal(adapter.layers[2]["q_proj"].a, expected.layers[2]["q_proj"].a)
    np.testing.assert_array_equal(adapter.outer["embed_tokens"].b, expected.outer["embed_tokens"].b)


def test_untrained_adapter_is_fine(tmp_path: Path):
    write_adapter(tmp_path, BASE, scale_std=0.0)
    assert not read_adapter(tmp_path, BASE).layers[0]["q_proj"].b.any()


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone(tmp_path: Path, init: object):
    read_adapter(write_adapter(tmp_path, BASE, init_lora_weights=init), BASE)


def test_fields_that_do_not_matter(tmp_path: Path):
    write_adapter(
        tmp_path,
        BASE,
        lora_dropout=0.1,
        fan_in_fan_out=True,
        eva_config={"rho": 2.0},
        layers_to_transform=[0],
        auto_mapping={"base_model_class": "LlamaForCausalLM"},
        a_field_of_tomorrow=None,
        another={},
        switched_off=False,
    )
    read_adapter(tmp_path, BASE)


def test_only_the_needed_fields(tmp_path: Path):
    write_adapter(tmp_path, BASE, rank=4, alpha=2)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_adapter(tmp_path, BASE).layers[0]["q_proj"].scale == 0.5


def test_every_field_of_peft_is_in_one_table():
    tables = (peft_config.READ_FIELDS, peft_config.IGNORED_FIELDS, peft_config.REFUSED_FIELDS)
    for field in PEFT_DEFAULTS:
        assert sum(field in table for table in tables) == 1, field


ranks = st.integers(1, 9)
alphas = st.integers(-4, 64) | st.floats(-1e3, 1e3)
patterns = st.sampled_from([
    "q_proj", "k_proj|v_proj", "layers.1.self_attn.q_proj", r"model\.layers\.[02]\..*", ".*_proj",
    "^model.layers.2.self_attn.k_proj", "proj", "self_attn", "layers.1", "lm_head", "head",
])  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=ranks,
    alpha=alphas,
    rslora=st.booleans(),
    rank_pattern=st.dictionaries(patterns, ranks, max_size=3),
    alpha_pattern=st.dictionaries(patterns, alphas, max_size=3),
)
def test_scale(
    tmp_path: Path,
    rank: int,
    alpha: float,
    rslora: bool,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
):
    # The file's order counts, and the writer sorts keys as PEFT does.
    rank_pattern = dict(sorted(rank_pattern.items()))
    alpha_pattern = dict(sorted(alpha_pattern.items()))

    def value_of(pattern: dict[str, Any], path: str, default: Any) -> Any:
        return next((v for key, v in pattern.items() if matches(key, path)), default)

    write_adapter(
        tmp_path,
        BASE,
        rank=rank,
        alpha=alpha,
        modules=("q_proj", "k_proj", "lm_head"),
        rank_of=lambda path: value_of(rank_pattern, path, rank),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=rslora,
    )
    adapter = read_adapter(tmp_path, BASE)
    for layer, pairs in enumerate((*adapter.layers, adapter.outer)):
        for module, pair in pairs.items():
            path = module_path(module, layer)
            expected_rank = value_of(rank_pattern, path, rank)
            expected_alpha = value_of(alpha_pattern, path, alpha)
            divisor = math.sqrt(expected_rank) if rslora else expected_rank
            assert pair.rank == expected_rank
            assert pair.scale == pytest.approx(expected_alpha / divisor)


def matches(pattern: str, path: str) -> bool:
    """What PEFT's rule comes to for the patterns above, without regular expressions."""
    layer_and_module = {
        "q_proj": path.endswith(".q_proj"),
        "k_proj|v_proj": path.endswith((".k_proj", ".v_proj")),
        "layers.1.self_attn.q_proj": path.endswith("layers.1.self_attn.q_proj"),
        r"model\.layers\.[02]\..*": path.startswith(("model.layers.0.", "model.layers.2.")),
        ".*_proj": path.endswith("_proj"),
        "^model.layers.2.self_attn.k_proj": path == "model.layers.2.self_attn.k_proj",
        "lm_head": path == "lm_head",
    }
    return layer_and_module.get(pattern, False)  # a part of a component, or not the end


def test_first_pattern_of_the_file_wins(tmp_path: Path):
    write_adapter(tmp_path, BASE, rank=4)
    for keys in (["q_proj", ".*proj"], [".*proj", "q_proj"]):
        edit_config(tmp_path, alpha_pattern={keys[0]: 4, keys[1]: 8})
        assert read_adapter(tmp_path, BASE).layers[0]["q_proj"].scale == 1.0


def test_digest_is_of_the_content_not_the_path(tmp_path: Path):
    path = write_adapter(tmp_path / "one", BASE)
    digest = read_adapter(path, BASE).digest
    copy = shutil.copytree(path, tmp_path / "two")
    assert read_adapter(copy, BASE, name="other").digest == digest
    assert len(digest) == 64


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"alpha": 17}, {"dtype": "bfloat16"}, {"use_rslora": True}, {"rank": 9}]
)
def test_digest_changes_with_the_content(tmp_path: Path, change: dict[str, Any]):
    before = read_adapter(write_adapter(tmp_path, BASE), BASE).digest
    assert read_adapter(write_adapter(tmp_path, BASE, **change), BASE).digest != before


def test_digest_changes_with_one_weight(tmp_path: Path):
    before = read_adapter(write_adapter(tmp_path, BASE), BASE).digest
    a = load_file(tmp_path / "adapter_model.safetensors")[Q0_A]
    a[3, 5] = np.nextafter(a[3, 5], 1)
    edit_tensors(tmp_path, **{Q0_A: a})
    assert read_adapter(tmp_path, BASE).digest != before
