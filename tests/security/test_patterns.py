# SPDX-License-Identifier: Apache-2.0
"""Regular expressions from adapters' files: they mean what PEFT's do, and take linear time."""

import re
import warnings
from pathlib import Path
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.patterns import ModulePatterns
from slora_jax.adapters.peft import read_adapter
from slora_jax.adapters.peft_tensors import module_paths
from tests.adapters.make import BASE, edit_config, write_adapter

FILE = Path("adapter_config.json")
PATHS = [*module_paths(BASE)]


def find(key: str, path: str) -> bool:
    return ModulePatterns("rank_pattern", {key: 1}, FILE).find(path) == (key, 1)


def refusal(*keys: str) -> str:
    with pytest.raises(AdapterError) as error:
        ModulePatterns("rank_pattern", dict.fromkeys(keys, 1), FILE)
    return str(error.value)


EXPONENTIAL = [
    r"(([a-z_0-9.]+)+)+!",
    r"(a|a|[a-z.]|.)*!",
    r"(.*)*(.*)*(.*)*(.*)*!",
    r"((.?){40}){20}(.){200}!",
    r"(model|m|o|d|e|l|\.|\w+)*\d\d\d",
    r"(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*!",
]


@pytest.mark.parametrize("key", EXPONENTIAL)
def test_exponential_ones_take_a_moment(key: str):
    patterns = ModulePatterns("alpha_pattern", {key: 1.0}, FILE)
    began = process_time()
    assert [patterns.find(path) for path in PATHS] == [None] * len(PATHS)
    assert process_time() - began < 5, "Python's re takes years"


def test_an_adapter_with_one_is_read(tmp_path: Path):
    plain = read_adapter(write_adapter(tmp_path, BASE), BASE)
    edit_config(tmp_path, rank_pattern={EXPONENTIAL[0]: 64}, alpha_pattern={EXPONENTIAL[1]: 64})
    [*layers], _ = read_adapter(tmp_path, BASE).layers, None
    for layer, before in zip(layers, plain.layers, strict=True):
        assert {n: p.scale for n, p in layer.items()} == {n: p.scale for n, p in before.items()}


@pytest.mark.parametrize(
    "key",
    [
        *(r"(?=q_proj)q_proj", r"(?!k)q_proj", r"(?<=\.)q_proj", r"(q)_proj\1", r"(?P<a>q)(?P=a)"),
        *(r"q_proj\Z", r"(?>q+)_proj", r"q++_proj", r"(?x: q_proj )", r"(?a:q_proj)", r"(?#no)q"),
        *(r"q{,3}_proj", r"[[:alpha:]]_proj", r"[[a-z]_proj", r"[a-z--q]_proj", r"[a-z&&q]_proj"),
        *(r"\pL_proj", r"\Qq_proj\E", r"\Cq", r"[[:word:]]+", r"q_proj)", r"(q_proj", "*q", "q**"),
        *("\u017f_proj", r"(?i:K)_proj\u0130", r"\N{LATIN SMALL LETTER Q}_proj", r"q{1001}"),
        *(r"(((q{10}){10}){10}){10}", r"(?P<n>q)(?P<n>q)", r"(?(1)q|k)_proj"),
        "(" * 5000 + ")" * 5000,
    ],
)  # fmt: skip
def test_what_re2_reads_otherwise_or_not_is_refused(key: str):
    message = refusal(key)
    assert message.startswith(f"{FILE}: rank_pattern has the key {key!r}"[:200])
    assert "linear time" in message
    assert "Write" in message


def test_numbers_and_sizes_have_limits():
    assert "1025 patterns" in refusal(*(f"x{i}" for i in range(1025)))
    assert "instructions" in refusal(*(f"{i}(.?){{900}}" for i in range(99)))
    own = {re.escape(path): rank for rank, path in enumerate(PATHS, 1)}
    patterns = ModulePatterns("rank_pattern", own, FILE)  # one for each module is usual
    assert [patterns.find(path) for path in PATHS] == [*own.items()]


PIECES = st.sampled_from(
    [
        *("model", r"\.", ".", "layers", "0", "1", "[0-9]", "[^0-9]", r"\d", r"\D", r"\w+", r"\W"),
        *("self_attn", "q_proj", "k_proj", ".*", ".+", ".*?", "[a-z_]+", r"\b", r"\B", "^", "$"),
        *("(q|k)_proj", "(?:up|down)_proj", "x?", "p{1}", "l{0,2}", "l{1,}", "(?i:Q_PROJ)", "|"),
        *("()", "(a|)", "[.]", "[]a]", "[^]a]", "[a-]", r"\A", "{", "}", "a{", "{2}", "a{2,1}"),
        *("(?P<n>q)", "(?s:.)", "(?m:^)", r"\x71", "_", "-", "lm_head", "embed_tokens", r"\\", "]"),
        *("{,2}", "+", "*", "?", "(", ")", "[", "++", "(?", "--", "[[", r"\Z", r"\1", r"\s", "\n"),
    ]
)


@settings(max_examples=1500)
@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from(PATHS))
def test_what_is_accepted_means_what_it_means_to_peft(key: str, path: str):
    try:
        found = find(key, path)
    except AdapterError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where Python warns, it may change its mind
        assert found == bool(re.match(rf"(.*\.)?({key})$", path))
