# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the kernels' benchmarks, and that they run."""

import json

import pytest

from benchmarks import kernels
from benchmarks.attention_problems import Decode, Prefill, Rope
from benchmarks.measure import Ceilings, Timing, Work
from benchmarks.projection_problems import Lora, Matmul
from benchmarks.record import ENVIRONMENT
from benchmarks.shapes import LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B_OF_8

MHA = {"model": "llama-2-7b", "shape": LLAMA_2_7B}
GQA = {"model": "llama-3-8b", "shape": LLAMA_3_8B}


def test_work_of_decode():
    kv = 64 * 2048 * 2 * 8 * 128 * 2
    queries_and_results = 2 * 64 * 32 * 128 * 2
    work = Decode(**GQA, batch=64, context=2048).work
    assert work == Work(kv + queries_and_results, 4 * 64 * 2048 * 32 * 128)


def test_work_of_prefill_is_causal():
    one = Prefill(**GQA, tokens=4).work
    assert one.flops == (1 + 2 + 3 + 4) * 4 * 32 * 128
    two = Prefill(**GQA, tokens=8, requests=2).work
    assert (two.bytes, two.flops) == (2 * one.bytes, 2 * one.flops)


def test_work_of_rope():
    work = Rope(**MHA, tokens=10).work
    assert work.bytes == 10 * (2 * 2 * 3 * 32 * 128 + 2 * 64 * 4)


def test_work_of_projections():
    sharded = Matmul(model="", shape=LLAMA_3_70B_OF_8, projection="gate_up", tokens=64)
    assert sharded.columns == (8192, 2 * 3584)
    work = Matmul(**MHA, projection="qkv", tokens=64).work
    assert work.flops == 2 * 64 * 4096 * 12288
    assert work.bytes == 2 * (4096 * 12288 + 64 * (4096 + 12288))


@pytest.mark.parametrize(("ranks", "each"), [((16,) * 64, 1), ((16,), 64), ((8, 64), 32)])
def test_work_of_lora(ranks, each):
    work = Lora(**MHA, projection="qkv", ranks=ranks, each=each).work
    of_rank = 3 * 4096 + 12288
    assert work.flops == 2 * each * sum(ranks) * of_rank
    assert work.bytes == 2 * (sum(ranks) * of_rank + 64 * (4096 + 2 * 12288))


def test_the_limit_is_the_slower_of_traffic_and_arithmetic():
    ceilings = Ceilings(bandwidth=4e12, flops=8e14)
    assert ceilings.limit_us(Work(bytes=4_000_000, flops=1)) == pytest.approx(1)
    assert ceilings.limit_us(Work(bytes=1, flops=1_600_000_000)) == pytest.approx(2)


def test_timing():
    timing = Timing.of([30.0, 10.0, 20.0]).each(10).without(0.5)
    assert timing == Timing(us=1.5, us_min=0.5, us_max=2.5)


def test_every_case_is_measured_once():
    problems = [case.problem for case in kernels.cases()]
    assert len(set(problems)) == len(problems)


def test_the_target_table_is_complete():
    names = {f"{case.problem.op}: {case.problem.name}" for case in kernels.target_cases()}
    assert names == {
        "paged_decode: 32/32 heads, batch 64, context 2048",
        "paged_decode: 32/32 heads, batch 64, context 320",
        "paged_decode: 32/8 heads, batch 64, context 2048",
        "paged_decode: 32/8 heads, batch 8, context 8192",
        "paged_prefill: 32/8 heads, 4096 tokens, causal",
        "lora_delta: qkv 4096, 64 tokens, 64 adapters, rank 16",
        "lora_delta: qkv 4096, 64 tokens, 64 adapters, ranks 8, 16, 32, 64",
        "lora_delta: qkv 4096, 64 tokens, one adapter, rank 16",
        "lora_delta: qkv 4096, 4096 tokens, 8 adapters, rank 16",
    }


@pytest.mark.long
def test_results_are_lines_of_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "abc")
    file = tmp_path / "new" / "kernels.jsonl"
    only = "llama-2-7b (.*batch 64, context 320|.*each|.*, 4096 tokens, 8 ad|.*heads, 64 tokens)"
    assert kernels.main(["--smoke", "--only", only, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert file.read_text() == printed
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["benchmark"] for line in lines[:3]] == ["ceiling"] * 3
    measured = {line["benchmark"]: line for line in lines[3:]}
    assert set(measured) == {"paged_decode", "rope_kv_write", "skinny_matmul", "lora_delta"}
    for line in measured.values():
        assert line["commit"] == "abc"
        assert line["backend"] == "xla"
        assert line["us_min"] <= line["us"] <= line["us_max"]
    line = measured["paged_decode"]
    assert line["ratio"] == pytest.approx(line["limit_us"] / line["us"], abs=2e-3)
    assert measured["lora_delta"]["base_us"] == measured["skinny_matmul"]["us"]
