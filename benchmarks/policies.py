# SPDX-License-Identifier: Apache-2.0
"""Simulates S-LoRA's scheduling experiments and sets the figures beside those it measured.

python -m benchmarks.policies            # simulate, and write docs/scheduling.md's tables
python -m benchmarks.policies --tables   # only write the tables, from the committed results

Nothing here was fitted: see `benchmarks/fit_cost_model.py` for what was.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.slora_figures import ATTAINMENT, CLUSTERS, CVS, RATES
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.simulator.metrics import measure
from slora_jax.simulator.presets import FITTED, PRESETS
from slora_jax.simulator.simulation import simulate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "policies.json"
PAGE = ROOT / "docs" / "scheduling.md"
START, END = "<!-- simulated:start -->", "<!-- simulated:end -->"
SEEDS = (0, 1, 2)
SLO_S = 6.0
POLICIES = ("fcfs", "lcfs", "abort", "cluster", "vtc")


@dataclass(frozen=True, slots=True)
class Experiment:
    """One cell of a table.

    Attributes:
        kind: which table: "cv", "rate", "cluster", "skew" or "watermark".
        preset: of the simulator.
        workload, options: what is different from the preset and from the defaults.
        measured: S-LoRA's figures of the same experiment, as far as there are any.
    """

    kind: str
    preset: str
    workload: dict[str, Any]
    options: dict[str, Any]
    measured: dict[str, float]

    def run(self) -> dict[str, Any]:
        """The mean of each figure over the seeds, and the attainments that it is the mean of."""
        preset = PRESETS[self.preset]
        workload = replace(preset.workload, **self.workload)
        options = SchedulingOptions(**self.options)
        runs = [
            measure(
                simulate(workload.arrivals(seed), preset.ranks, preset.server(), options), SLO_S
            )
            for seed in SEEDS
        ]
        names = (
            "throughput", "first_token_s", "worst_wait_s", "attainment", "satisfaction",
            "fairness", "worst_adapter", "rejected", "preemptions",
        )  # fmt: skip
        return {
            "kind": self.kind,
            "preset": self.preset,
            "workload": self.workload,
            "options": self.options,
            "measured": self.measured,
            "simulated": {
                name: round(float(np.mean([getattr(run, name) for run in runs])), 3)
                for name in names
            },
            "attainments": [round(run.attainment, 3) for run in runs],
        }


def experiments() -> Iterable[Experiment]:
    """Everything that the tables show."""
    for preset, policies in ATTAINMENT.items():
        for policy, figures in policies.items():
            for cv, figure in zip(CVS, figures, strict=True):
                options = {"scheduling_policy": policy}
                yield Experiment("cv", preset, {"cv": cv}, options, {"attainment": figure})
    for preset, rates in RATES.items():
        for rate, (throughput, first, attainment) in rates.items():
            figures = {
                "throughput": throughput, "first_token_s": first, "attainment": attainment
            }  # fmt: skip
            yield Experiment("rate", preset, {"rate": rate}, {}, figures)
    for alpha, limits in CLUSTERS.items():
        workload = {"adapters": 32, "rate": 2, "seconds": 120, "alpha": alpha}
        for d, (throughput, attainment) in limits.items():
            options = {"scheduling_policy": "cluster", "cluster_adapters": d}
            figures = {"throughput": throughput, "attainment": attainment}
            yield Experiment("cluster", "a100-40-s4", workload, options, figures)
    for policy in POLICIES:
        options = {"scheduling_policy": policy}
        yield Experiment("skew", "a10g-s2", {"zipf": 1.2}, options, {})
    for share in (0.0, 0.01, 0.03, 0.05, 0.1, 0.2):
        for preset in ("a10g-s2", "a100-80-s4"):
            yield Experiment("watermark", preset, {}, {"admission_watermark": share}, {})


def tables(results: list[dict[str, Any]]) -> str:
    """The tables, as they stand in the page."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["kind"], []).append(result)
    return "\n\n".join(
        [
            "### The fit",
            _fit_table(),
            "### Attainment by policy, held out",
            _cv_table(rows["cv"]),
            "### First come, first served, by request rate, held out",
            _table(
                ["preset", "requests/s", *_pairs("finished/s", "mean first token, s", "attained")],
                rows["rate"],
                lambda r: [r["preset"], f"{r['workload']['rate']:g}"],
                ("throughput", "first_token_s", "attainment"),
            ),
            "### Adapter clustering, held out",
            _table(
                ["alpha", "d", *_pairs("finished/s", "attained")],
                rows["cluster"],
                lambda r: [f"{r['workload']['alpha']:g}", str(r["options"]["cluster_adapters"])],
                ("throughput", "attainment"),
            ),
            "### A skewed load (Zipf 1.2, preset `a10g-s2`), simulated only",
            _simulated_table(
                ["policy", "attained", "fairness", "longest wait, s", "finished/s", "rejected"],
                rows["skew"],
                lambda r: [r["options"]["scheduling_policy"]],
                ("attainment", "fairness", "worst_wait_s", "throughput", "rejected"),
            ),
            "### The admission watermark, simulated only",
            _simulated_table(
                ["preset", "watermark", "finished/s", "preemptions"],
                rows["watermark"],
                lambda r: [r["preset"], f"{r['options']['admission_watermark']:g}"],
                ("throughput", "preemptions"),
            ),
        ]
    )


def summary(results: list[dict[str, Any]]) -> str:
    """The README's table: attainment of the paper's two overloaded servers, Poisson arrivals."""
    lines: dict[str, list[str]] = {}
    for result in results:
        if result["kind"] == "cv" and result["workload"]["cv"] == 1:
            pair = result["measured"]["attainment"], result["simulated"]["attainment"]
            lines.setdefault(result["preset"], []).append("{:.2f} / **{:.2f}**".format(*pair))
    header = ["`--preset`", "`fcfs`", "`lcfs`", "`abort`"]
    rows = ([f"`{name}`", *lines[name]] for name in ("a10g-s2", "a100-80-s4"))
    return _markdown(header, rows)


def _pairs(*names: str) -> list[str]:
    return [f"{name}: {who}" for name in names for who in ("S-LoRA", "simulated")]


def _markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fit_table() -> str:
    header = ["device", "base", "lora", "rank", "rows fitted", "simulated ÷ measured"]
    rows = []
    for name, entry in json.loads(FITTED.read_text()).items():
        ratios = [row["simulated"] / row["throughput"] for row in entry["throughputs"]]
        factors = [f"{entry['fit'][key]:.2f}" for key in ("base", "lora", "rank")]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append([name, *factors, str(len(ratios)), spread])
    return _markdown(header, rows)


def _cv_table(results: list[dict[str, Any]]) -> str:
    """A line for each preset and policy, a column for each cv: measured, then simulated."""
    lines: dict[tuple[str, str], list[str]] = {}
    for result in results:
        key = result["preset"], result["options"]["scheduling_policy"]
        pair = result["measured"]["attainment"], result["simulated"]["attainment"]
        lines.setdefault(key, []).append("{:.2f} / **{:.2f}**".format(*pair))
    header = ["preset", "policy", *(f"cv {cv}" for cv in CVS)]
    return _markdown(header, ([*key, *cells] for key, cells in lines.items()))


def _table(
    header: list[str],
    results: list[dict[str, Any]],
    label: Callable[[dict[str, Any]], list[str]],
    names: tuple[str, ...],
) -> str:
    return _markdown(
        header,
        (
            label(r)
            + [f"{r[who][name]:.2f}" for name in names for who in ("measured", "simulated")]
            for r in results
        ),
    )


def _simulated_table(
    header: list[str],
    results: list[dict[str, Any]],
    label: Callable[[dict[str, Any]], list[str]],
    names: tuple[str, ...],
) -> str:
    return _markdown(
        header, (label(r) + [f"{r['simulated'][name]:.2f}" for name in names] for r in results)
    )


def updated(page: str, results: list[dict[str, Any]]) -> str:
    """The page with the results' tables between its markers."""
    before, rest = page.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{tables(results)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="S-LoRA's policies, simulated")
    parser.add_argument("--tables", action="store_true", help="from the committed results")
    if not parser.parse_args().tables:
        with ProcessPoolExecutor(max_workers=2) as pool:
            results = list(pool.map(Experiment.run, experiments()))
        RESULTS.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(result) for result in results)
        RESULTS.write_text(f"[\n{lines}\n]\n")
    PAGE.write_text(updated(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
