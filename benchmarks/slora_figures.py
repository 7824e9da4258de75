# SPDX-License-Identifier: Apache-2.0
"""What S-LoRA measured: the result files that its authors published, under `benchmarks/` of
github.com/S-LoRA/S-LoRA, and the settings that its scripts gave them.

`THROUGHPUTS` is what the simulator's devices are fitted to. All else is held out.
"""

from dataclasses import dataclass

CVS = (1, 2, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Requests a second, first come first served, the time until the last one ends included."""

    preset: str
    adapters: int
    rate: float
    throughput: float


def _row(preset: str, rate: float, by_adapters: dict[int, float]) -> list[Throughput]:
    return [Throughput(preset, n, rate, figure) for n, figure in by_adapters.items()]


THROUGHPUTS: list[Throughput] = [
    *_row("a10g-s1", 2, {1: 1.831, 20: 1.812, 50: 1.788, 100: 1.781, 200: 1.775}),
    *_row("a10g-s2", 2, {0: 1.85, 1: 1.744, 20: 1.680, 50: 1.606, 100: 1.593, 200: 1.576}),
    *_row("a10g-s2", 2.5, {0: 1.996, 1: 1.878, 10: 1.705, 25: 1.616, 50: 1.563, 100: 1.528}),
    *_row("a100-40-s4", 2, {0: 1.821, 1: 1.671, 20: 1.523, 50: 1.445, 100: 1.411, 200: 1.408}),
    *_row("a100-80-s2", 10, {0: 9.641, 1: 7.737, 20: 7.926, 50: 7.84, 100: 7.74, 200: 7.52}),
    *_row("a100-80-s4", 6, {0: 5.586, 1: 4.429, 100: 4.301, 200: 4.17, 400: 4.06}),
]

# Share of requests whose first token came within 6 s, by policy and by the arrivals' cv (`CVS`).
ATTAINMENT: dict[str, dict[str, tuple[float, ...]]] = {
    "a10g-s2": {
        "fcfs": (0.27, 0.263, 0.433, 0.408, 0.315),
        "lcfs": (0.79, 0.697, 0.64, 0.60, 0.50),
        "abort": (0.858, 0.817, 0.743, 0.69, 0.637),
    },
    "a100-80-s4": {
        "fcfs": (0.101, 0.101, 0.099, 0.279, 0.136),
        "lcfs": (0.699, 0.701, 0.593, 0.575, 0.447),
        "abort": (0.719, 0.719, 0.685, 0.66, 0.562),
    },
    "a10g-s1": {
        "fcfs": (0.517, 0.477, 0.562, 0.518, 0.48),
        "abort": (0.942, 0.898, 0.815, 0.758, 0.743),
    },
}

# By the rate: throughput, mean first-token latency in seconds, attainment; first come first served.
RATES: dict[str, dict[float, tuple[float, float, float]]] = {
    "a100-80-s4": {
        1: (0.942, 0.36, 1.0),
        2: (1.838, 0.50, 1.0),
        4: (3.539, 0.74, 1.0),
        6: (4.012, 60.0, 0.102),
        8: (4.017, 136.5, 0.059),
    },
    "a10g-s2": {
        1: (0.961, 0.318, 1.0),
        1.5: (1.364, 1.17, 0.978),
        2: (1.575, 23.6, 0.272),
        2.5: (1.536, 87.4, 0.055),
    },
    "a10g-s1": {
        1: (0.963, 0.28, 1.0),
        1.5: (1.371, 0.37, 1.0),
        2: (1.777, 6.1, 0.515),
        2.5: (1.804, 52.0, 0.115),
    },
}

# On an A100-40 with S4, 32 adapters, 2 requests/s for 120 s: throughput and attainment, by alpha
# and by d, the most adapters at a time.
CLUSTERS: dict[float, dict[int, tuple[float, float]]] = {
    1.0: {
        1: (1.232, 0.50),
        2: (1.256, 0.49),
        4: (1.259, 0.51),
        8: (1.252, 0.49),
        32: (1.169, 0.28),
    },
    0.1: {
        1: (1.234, 0.38),
        2: (1.239, 0.38),
        4: (1.227, 0.38),
        8: (1.198, 0.35),
        32: (1.191, 0.30),
    },
}
