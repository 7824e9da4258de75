# SPDX-License-Identifier: Apache-2.0
"""Fits the simulator's devices to the throughputs that S-LoRA measured, and to nothing else.

python -m benchmarks.fit_cost_model

Three factors a device, least squares of the throughputs' logarithms, by Gauss-Newton steps whose
Jacobian is measured once and then kept up by Broyden's updates. Each throughput is that of a whole
simulated trace, first come first served, so that what the load limits is not taken for what the
device can do.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

import numpy as np

from benchmarks.slora_figures import THROUGHPUTS, Throughput
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.simulator.device import Fit
from slora_jax.simulator.metrics import measure
from slora_jax.simulator.presets import DEVICES, FITTED, PRESETS
from slora_jax.simulator.simulation import simulate

SEEDS = (0, 1)
ITERATIONS = 6
_START = np.array([0.3, 0.3, 1.0])  # log of the base factor, the others as they are
_STEP = np.array([0.1, 0.2, 0.5])  # apart enough for the traces' noise
_DAMPING = 1e-3


def throughput(row: Throughput, fit: Fit) -> float:
    """The same figure, simulated: the mean over the seeds."""
    preset = PRESETS[row.preset]
    workload = replace(preset.workload, adapters=row.adapters, rate=row.rate)
    server = DEVICES[preset.device].server(fit)
    return float(
        np.mean(
            [
                measure(
                    simulate(workload.arrivals(seed), preset.ranks, server, SchedulingOptions()), 6
                ).throughput
                for seed in SEEDS
            ]
        )
    )


def as_fit(x: np.ndarray) -> Fit:
    """No factor is negative."""
    base, lora, rank = float(np.exp(x[0])), *np.maximum(x[1:], 0.0).tolist()
    return Fit(round(base, 4), round(lora, 4), round(rank, 4))


def fit_device(name: str) -> dict:
    """The factors of a device, and how far its throughputs are from the measured ones."""
    rows = [row for row in THROUGHPUTS if PRESETS[row.preset].device == name]
    measured = np.array([row.throughput for row in rows])

    def errors(x: np.ndarray) -> np.ndarray:
        return np.log([throughput(row, as_fit(x)) for row in rows] / measured)

    x = _START
    now = best = errors(x)
    best_x = x
    jacobian = np.stack([(errors(x + step) - now) / step.sum() for step in np.diag(_STEP)], axis=1)
    for _ in range(ITERATIONS):
        normal = jacobian.T @ jacobian + _DAMPING * np.eye(len(x))
        step = -np.linalg.solve(normal, jacobian.T @ now)
        step = np.clip(step, -4 * _STEP, 4 * _STEP)
        step[1:] = np.maximum(x[1:] + step[1:], 0.0) - x[1:]
        if np.abs(step / _STEP).max() < 1e-2:
            break
        then = errors(x + step)
        jacobian += np.outer(then - now - jacobian @ step, step) / (step @ step)
        x, now = x + step, then
        if now @ now < best @ best:
            best, best_x = now, x
    return {"fit": asdict(as_fit(best_x)), "throughputs": _compared(rows, best)}


def _compared(rows: Sequence[Throughput], errors: np.ndarray) -> list[dict]:
    return [
        {**asdict(row), "simulated": round(row.throughput * float(np.exp(error)), 3)}
        for row, error in zip(rows, errors, strict=True)
    ]


def main() -> None:
    with ProcessPoolExecutor(max_workers=2) as pool:
        fits = dict(zip(DEVICES, pool.map(fit_device, DEVICES), strict=True))
    FITTED.write_text(json.dumps(fits, indent=1) + "\n")
    for name, entry in fits.items():
        ratios = [row["simulated"] / row["throughput"] for row in entry["throughputs"]]
        print(f"{name}: {entry['fit']}, simulated / measured {min(ratios):.3f}-{max(ratios):.3f}")


if __name__ == "__main__":
    main()
