# SPDX-License-Identifier: Apache-2.0
"""The figures of a trace by hand, and the benchmark itself on a CPU."""

import argparse
import json

import pytest

from benchmarks import ablations, adapters, trace
from benchmarks.measure import Ceilings
from benchmarks.settings import ARENA_OUTPUT, ARENA_PROMPT, arrivals_of
from benchmarks.shapes import TINY
from benchmarks.trace_figures import RequestTimes, SteadyWindow, figures
from slora_jax.scheduling.cost_model import StepLoad


def test_figures_by_hand():
    served = [
        RequestTimes(0.0, 3, 0.5, [1.0, 1.1, 1.3]),
        RequestTimes(1.0, 2, 2.0, [8.0, 8.5]),  # too late a first token
        RequestTimes(2.0, 4, 8.5, [9.0]),  # not finished
        RequestTimes(3.0, 4),  # not begun, and 6 s are over
        RequestTimes(9.0, 4),  # not begun, and nobody knows
    ]
    found = figures(served, 10.0, 10.0)
    assert (found["requests"], found["finished"]) == (5, 2)
    assert found["req_s"] == 0.2
    assert found["out_tok_s"] == 0.6
    assert found["ttft_mean_s"] == pytest.approx((1 + 7 + 7) / 3, abs=1e-4)
    assert found["itl_p50_ms"] == pytest.approx(200)
    assert found["tpot_mean_ms"] == pytest.approx((150 + 500) / 2)
    assert found["e2e_mean_s"] == pytest.approx((1.3 + 7.5) / 2)
    assert found["attainment"] == 0.25
    assert found["satisfaction"] == pytest.approx((1 - 1 / 36) / 4, abs=1e-4)


def test_the_steady_window_begins_after_four_latencies_and_lasts_four():
    """Of one request a second that takes a second, in service, whatever its time in the queue."""
    served = [RequestTimes(i - 7.0, 2, i + 0.0, [i + 0.5, i + 1.0]) for i in range(20)]
    assert SteadyWindow.of(served, 10.0) == SteadyWindow(4.0, 10.0, 1.0)
    assert SteadyWindow.of(served, 7.9) is None
    assert SteadyWindow.of([RequestTimes(0.0, 2, 0.0, [1.0])], 100.0) is None
    found = figures(served, 30.0, 10.0)  # the end of the arrivals is the window's
    assert found["req_s_steady"] == 1.0
    assert found["out_tok_s_steady"] == 2.0
    assert figures(served[:7], 7.0, 7.0)["req_s_steady"] is None


def test_what_steps_take_at_best():
    """Weights in bytes or FLOPs, whichever takes longer, and then what each step reads."""
    load = StepLoad(tokens=10, context=100, rank_sum=16, installed_rank=0)
    steps = [trace.Step(0.0, load, 10, 0, 0)]
    layer = 128 * (256 + 128 + 128) + 256 * 128 + 3 * 128 * 256
    weights = 2 * layer + 128 * 256
    kv, lora = 2 * 2 * 2 * 64 * 100, 2 * 16 * (384 + 256 + 256 + 384)
    many, few = 1e30, 1e3
    bytes_only = trace.least_seconds(TINY, steps, 2, Ceilings(few, many))
    assert bytes_only == pytest.approx(2 * (weights + kv + lora) / few)
    flops = trace.least_seconds(TINY, steps, 2, Ceilings(many, few))
    assert flops == pytest.approx(2 * weights * 10 / few)


def arguments(**changed) -> argparse.Namespace:
    values = {
        "setting": "S1",
        "rate": 50.0,
        "duration": 100.0,
        "popularity": "power",
        "alpha": 1.0,
        "cv": 1.0,
        "lengths": "uniform",
        "seed": 0,
    }
    return argparse.Namespace(**(values | changed))


def test_lengths():
    uniform, arena = (arrivals_of(arguments(lengths=one), 26) for one in ("uniform", "arena"))
    assert min(one.prompt for one in uniform) == min(one.output for one in uniform) == 8
    assert max(one.prompt for one in uniform) == max(one.output for one in uniform) == 511
    mean_prompt = sum(one.prompt for one in arena) / len(arena)
    mean_output = sum(one.output for one in arena) / len(arena)
    assert mean_prompt == pytest.approx(ARENA_PROMPT, rel=0.05)
    assert mean_output == pytest.approx(ARENA_OUTPUT, rel=0.05)
    assert max(max(one.prompt, one.output) for one in arena) < 512
    assert [one.time for one in arena] == [one.time for one in uniform]
    assert {one.adapter for one in arena} == set(range(26))


def test_popularity():
    zipf = arrivals_of(arguments(popularity="zipf", alpha=1.5), 100)
    most = sum(one.adapter == 0 for one in zipf) / len(zipf)
    assert most == pytest.approx(1 / sum(k**-1.5 for k in range(1, 101)), rel=0.1)


ENGINE = "--setting tiny --batch 4 --step-tokens 16 --pages 96 --repetitions 1"


@pytest.mark.long
def test_rows(capfd, tmp_path):
    """More adapters than fit, so that they are evicted; every request is in the figures."""
    file = tmp_path / "results.jsonl"
    workload = "--rate 20 --duration 2 --adapters 0,12 --drain"
    assert trace.main([*f"{ENGINE} {workload}".split(), "--results", str(file)]) == 0
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [json.loads(text) for text in capfd.readouterr().out.splitlines()] == lines
    base, many = [line for line in lines if line["benchmark"] == "trace"]
    assert (base["adapters"], many["adapters"]) == (0, 12)
    assert base["loads"] == base["adapter_pages_mean"] == base["rank_sum_mean"] == 0
    assert many["loads"] > 12
    assert many["evictions"] >= many["loads"] - 12
    assert many["host_copies"] == 2
    for line in (base, many):
        assert line["finished"] == line["requests"] > 0
        assert line["limit_us"] > 0
        assert line["ttft_mean_s"] > 0
    assert base["requests"] == many["requests"]


def results_of(main, arguments: str, tmp_path) -> list[dict]:
    file = tmp_path / "results.jsonl"
    assert main([*arguments.split(), "--results", str(file)]) == 0
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    return [line for line in lines if line["benchmark"] != "ceiling"]


@pytest.mark.long
def test_growing_numbers_of_adapters(tmp_path):
    workload = "--rate 20 --duration 1 --adapters 4,0,1 --first-run 2"
    lines = results_of(adapters.main, f"{ENGINE} {workload}", tmp_path)
    assert [line["adapters"] for line in lines] == [0, 1, 4]
    assert [line["run"] for line in lines] == [2, 2, 2]
    base, one, four = lines
    assert base["of_base"] == 1
    assert one["of_fewest"] == 1
    rate = {line["adapters"]: line["out_tok_s_steady"] or line["out_tok_s"] for line in lines}
    assert four["of_base"] == pytest.approx(rate[4] / rate[0], abs=1e-3)
    assert four["of_fewest"] == pytest.approx(rate[4] / rate[1], abs=1e-3)


@pytest.mark.long
def test_ablations(tmp_path):
    chosen = "unified,split 60 %,no prefetch,abort,base,padded"
    lines = results_of(
        lambda given: ablations.main([*given, "--variations", chosen]),
        f"{ENGINE.replace('96', '160')} --rate 20 --duration 1 --adapters 6",
        tmp_path,
    )
    assert [line["variation"] for line in lines] == chosen.split(",")
    found = {line["variation"]: line for line in lines}
    assert found["split 60 %"]["adapter_share"] == 0.6
    assert found["split 60 %"]["adapter_pages_mean"] <= 0.6 * 159
    assert found["no prefetch"]["prefetch_lookahead"] == 1
    assert found["abort"]["scheduling_policy"] == "abort"
    assert found["base"]["adapters"] == found["base"]["loads"] == 0
    assert found["padded"]["ranks"] == [16]
    assert found["unified"]["ranks"] == [16, 8]


def test_an_unknown_variation_is_named(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--setting", "tiny", "--variations", "unifed"])
    assert "no variation 'unifed': there are unified, " in capsys.readouterr().err
