# SPDX-License-Identifier: Apache-2.0
"""The page about scheduling shows the committed results, and these what the simulator does."""

import json
from dataclasses import replace

import pytest

from benchmarks.policies import (
    PAGE,
    RESULTS,
    SLO_S,
    Experiment,
    experiments,
    summary,
    updated,
)
from benchmarks.slora_figures import THROUGHPUTS
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.simulator.metrics import measure
from slora_jax.simulator.presets import FITTED, PRESETS
from slora_jax.simulator.simulation import simulate

COMMITTED = json.loads(RESULTS.read_text())


def test_the_page_says_what_was_simulated():
    assert updated(PAGE.read_text(), COMMITTED) == PAGE.read_text(), "python -m benchmarks.policies"


def test_the_readme_says_what_was_simulated():
    assert summary(COMMITTED) in (PAGE.parents[1] / "README.md").read_text()


def test_the_results_are_of_these_experiments():
    wanted = [(e.kind, e.preset, e.workload, e.options, e.measured) for e in experiments()]
    kept = [(r["kind"], r["preset"], r["workload"], r["options"], r["measured"]) for r in COMMITTED]
    assert kept == wanted


def test_a_result_is_what_the_simulator_gives():
    index = next(i for i, e in enumerate(experiments()) if e.kind == "cluster")
    experiment: Experiment = list(experiments())[index]
    assert experiment.run() == COMMITTED[index], "python -m benchmarks.policies"


def test_the_fit_is_of_the_throughputs_alone():
    fits = json.loads(FITTED.read_text())
    rows = [row for entry in fits.values() for row in entry["throughputs"]]
    assert {(r["preset"], r["adapters"], r["rate"], r["throughput"]) for r in rows} == {
        (t.preset, t.adapters, t.rate, t.throughput) for t in THROUGHPUTS
    }
    assert all(r["simulated"] == pytest.approx(r["throughput"], rel=0.08) for r in rows)


def test_the_committed_fit_gives_the_committed_throughputs():
    row = json.loads(FITTED.read_text())["a100-40-13b"]["throughputs"][1]
    preset = PRESETS[row["preset"]]
    workload = replace(preset.workload, adapters=row["adapters"], rate=row["rate"])
    runs = [
        measure(
            simulate(workload.arrivals(seed), preset.ranks, preset.server(), SchedulingOptions()),
            SLO_S,
        ).throughput
        for seed in (0, 1)
    ]
    assert sum(runs) / 2 == pytest.approx(row["simulated"], abs=2e-3)
