# SPDX-License-Identifier: Apache-2.0
"""Adapters' files that are nearly right: each is read, or refused by an AdapterError."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.peft import read_adapter
from slora_jax.adapters.peft_config import LoraConfig
from slora_jax.adapters.peft_tensors import AdapterTensors
from tests.adapters.make import BASE, PEFT_DEFAULTS, write_adapter

FILE = Path("made-up")
ODD = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 8, 1.5, 2**63, 10**400, -0.0, 1e308, float("nan"), "", "8"),
        *("none", "LORA", "\x00", "\ud800", "x" * 3000, [], {}, [[]], [8], {"q_proj": 8}),
        *({"(": 1}, {"(a+)+": 8}, {"q_proj": "8"}, {"": 4}, {"\ud800": 8}, "pissa", float("inf")),
    ]
)
VALUES = st.recursive(
    ODD, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=8), one)
)
NAMES = st.sampled_from([*PEFT_DEFAULTS, "unknown", "use_dora"])
FIELDS = st.dictionaries(NAMES, VALUES, max_size=4)


def read_or_refused[T](read: Callable[[], T], where: str) -> T | None:
    """What is read; None if it is refused in short words that name the place."""
    try:
        return read()
    except AdapterError as error:
        refusal = str(error)
    assert where in refusal
    assert len(refusal) < 5000
    return None


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(FIELDS, st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 8))
def test_configs(fields: dict[str, Any], at: int, bytes_: bytes, damage: int):
    text = json.dumps({**PEFT_DEFAULTS, **fields})
    content = text.encode("utf-8", "surrogatepass")
    if damage == 0:
        at %= len(content)
        content = content[:at] + bytes_ + content[at + len(bytes_) // 2 :]
    config = read_or_refused(lambda: LoraConfig.parse(content, FILE), str(FILE))
    if config is None:
        return
    rank, _ = config.rank_of("model.layers.0.self_attn.q_proj")
    assert rank >= 1
    assert np.isfinite(config.scale_of("model.layers.0.self_attn.q_proj"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = write_adapter(tmp_path_factory.mktemp("good"), BASE, layers=[0], modules=["q_proj"])
    return (directory / "adapter_model.safetensors").read_bytes()


def parse(content: bytes) -> None:
    found = read_or_refused(lambda: AdapterTensors.parse(content, BASE, FILE), str(FILE))
    if found is None:
        return
    assert found.factors
    for factors in found.factors.values():
        for tensor in factors.values():
            assert not tensor.array.flags.writeable


@settings(max_examples=1500)
@given(data=st.data())
def test_bytes_of_tensors(good: bytes, data: st.DataObject):
    """Some bytes of the header, or its length, are others, or a part is missing."""
    header = 8 + int.from_bytes(good[:8], "little")
    at = data.draw(st.integers(0, header))
    cut = data.draw(st.integers(0, 3))
    content = good[:at] + data.draw(st.binary(max_size=4)) + good[at + cut :]
    parse(content[: data.draw(st.sampled_from([len(content), header, at + 8]))])


SIZES = st.sampled_from([0, 1, 2, 8, 32, 2**31, 2**62, 2**64, -1, 1.5, "8", None])
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "", 3, None])
PLACES = st.lists(st.sampled_from([0, 4, 64, 1024, 2**63, -1]), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": st.lists(SIZES, max_size=5), "data_offsets": PLACES}
)
KEYS = st.sampled_from(
    [
        *(f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 9, "x")),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
        *("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"),
        *("base_model.model.model.embed_tokens.lora_embedding_A", "__metadata__", "", "\x00"),
        "base_model.model." + "a.lora_A" * 400 + ".weight",
    ]
)


@settings(max_examples=1000)
@given(st.dictionaries(KEYS, ENTRIES, max_size=4), st.sampled_from([0, 4, 64, 1024, 2048]))
def test_headers_of_tensors(entries: dict[str, Any], size: int):
    """A header of its own, whose shapes, types and places may be anything."""
    header = json.dumps(entries).encode()
    parse(len(header).to_bytes(8, "little") + header + bytes(size))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FIELDS, st.integers(0, 4000), st.binary(max_size=4))
def test_directories(tmp_path: Path, fields: dict[str, Any], at: int, bytes_: bytes):
    """Both files together, through the way that the engine reads them."""
    write_adapter(tmp_path, BASE, layers=[0], modules=["q_proj"], **fields)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    at %= len(content)
    file.write_bytes(content[:at] + bytes_ + content[at + len(bytes_) :])
    adapter = read_or_refused(lambda: read_adapter(tmp_path, BASE, max_rank=64), str(tmp_path))
    assert adapter is None or adapter.max_rank == 8
