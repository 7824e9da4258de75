# SPDX-License-Identifier: Apache-2.0
"""A target is reached, missed, reported or not yet measured; never anything else."""

import pytest

from benchmarks.targets import DEVICE, TARGETS, Target, many, prefill, step, summary, times, unified

WHERE = {"device": DEVICE, "commit": "abc", "date": "2026-01-01"}
STEP = {
    **WHERE,
    "benchmark": "decode",
    "backend": "mosaic",
    "shape": "llama-2-7b",
    "batch": 64,
    "prompt": 256,
    "modules": "attention",
    "adapters": 0,
    "resident": 0,
    "step_ms": 6.5,
}
TRACE = {**WHERE, "setting": "S1", "rate": 60.0, "duration": 66.0, "out_tok_s": 900.0}


def fixed(value: float | None, **bounds: float) -> list[str]:
    return Target("it", lambda lines: value, ".1f", **bounds).cells([])


def test_verdicts():
    assert fixed(2.0, most=2.0) == ["it", "≤ 2.0", "2.0", "yes"]
    assert fixed(2.1, most=2.0) == ["it", "≤ 2.0", "2.1", "missed"]
    assert fixed(2.0, least=2.0) == ["it", "≥ 2.0", "2.0", "yes"]
    assert fixed(1.9, least=2.0) == ["it", "≥ 2.0", "1.9", "missed"]
    assert fixed(2.1) == ["it", "", "2.1", ""]
    assert fixed(None, least=2.0) == ["it", "≥ 2.0", "not measured", ""]


def test_a_step_is_of_the_adapters_it_says():
    of_base, of_64 = step("step_ms", 64, 0), step("step_ms", 64, 64)
    beside = {**STEP, "resident": 64, "step_ms": 9.0}  # adapters lie there that nobody asks for
    adapted = {**STEP, "adapters": 64, "resident": 64, "step_ms": 7.2}
    assert of_base([beside]) is None
    assert of_base([STEP, beside, adapted]) == 6.5
    assert of_64([STEP, beside, adapted]) == 7.2
    assert step("step_ms", 256, 0)([STEP]) is None
    assert of_64([{**adapted, "modules": "all-linear"}]) is None
    assert of_64([adapted, {**adapted, "backend": "triton", "step_ms": 8.4}]) == 7.2


def test_the_worst_of_the_numbers_of_adapters_counts_once_all_are_measured():
    def row(adapters: int, value: float, run: int = 0) -> dict:
        return {**TRACE, "benchmark": "adapters", "adapters": adapters, "x": value, "run": run}

    worst = many("x", "S1", 1000, 2000)
    assert worst([row(1000, 0.9)]) is None
    runs = [row(2000, 0.5), row(2000, 0.8, 1), row(2000, 0.7, 2)]
    assert worst([row(5, 0.1), row(1000, 0.9), *runs]) == 0.7
    assert many("x", "S2", 1000)([row(1000, 0.9)]) is None


def test_times_of_another_server():
    ours = {**TRACE, "benchmark": "adapters", "adapters": 5}
    other = {**ours, "benchmark": "hf_peft", "out_tok_s": 30.0, "duration": 60.0}
    assert times("hf_peft", 5)([ours, other]) == 30
    assert times("hf_peft", 5)([ours]) is None
    assert times("hf_peft", 100)([ours, other]) is None


def test_prefill_is_the_one_with_adapters():
    line = {**WHERE, "benchmark": "prefill", "shape": "llama-2-7b", "prompt": 4096, "rank": 16}
    base, lora = {**line, "adapters": 0, "ratio": 0.7}, {**line, "adapters": 1, "ratio": 0.62}
    assert prefill([base]) is None
    assert prefill([base, lora]) == 0.62


def test_the_unified_pool_is_held_against_the_best_of_four_splits():
    line = {**TRACE, "benchmark": "ablations", "setting": "S4", "adapters": 400, "pages": 4096}
    found = [{**line, "variation": "unified"}]
    for share, rate in ((15, 500.0), (30, 600.0), (45, 450.0), (60, 100.0)):
        assert unified(found) is None
        found.append({**line, "variation": f"split {share} %", "out_tok_s": rate})
    found.append({**line, "variation": "lcfs", "out_tok_s": 5000.0})
    assert unified(found) == 1.5


def test_every_target_is_in_the_table_also_without_a_figure():
    assert summary([]) == summary([{**STEP, "device": "another"}]) == ""
    text = summary([STEP])
    assert len(text.splitlines()) == 2 + len(TARGETS)
    assert "| decode step, batch 64, base, ms | ≤ 6.60 | 6.50 | yes |" in text
    assert text.count("not measured") == len(TARGETS) - 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_target_has_two_bounds(target):
    assert target.most is None or target.least is None
