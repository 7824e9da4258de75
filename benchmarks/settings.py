# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's settings (section 7.1, table 2) and what its requests look like."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import MODELS
from slora_jax.config import ModelConfig
from slora_jax.simulator.workloads import Arrival, Workload

ARENA_PROMPT, ARENA_OUTPUT = 85, 165  # mean tokens in S-LoRA's real trace (section 7.2)


@dataclass(frozen=True, slots=True)
class Setting:
    """A base model and the ranks of its adapters, which adapt q, k, v and o.

    Attributes:
        shape: of `MODELS`.
        ranks: adapter i has `ranks[i % len(ranks)]`.
        longest: prompts and outputs have less tokens than this.
    """

    shape: str
    ranks: tuple[int, ...]
    longest: int = 512

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.shape]


SETTINGS = {
    "S1": Setting("llama-2-7b", (8,)),
    "S2": Setting("llama-2-7b", (64, 32, 16, 8)),
    "S4": Setting("llama-2-13b", (64, 32, 16)),
    "tiny": Setting("tiny", (16, 8), longest=64),  # to try a benchmark on a CPU
}


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What `arrivals_of` reads, but for `adapters`."""
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second that come")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds in which they come")
    parser.add_argument(
        "--popularity", choices=["power", "zipf"], default="power", help="of the adapters"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=1.0,
        help="power: 1 is uniform, less is skewed; zipf: the exponent",
    )
    parser.add_argument(
        "--cv", type=float, default=1.0, help="of times between arrivals; 1: Poisson"
    )
    parser.add_argument(
        "--lengths",
        choices=["uniform", "arena"],
        default="uniform",
        help="uniform in [8, 512); arena: exponential, with the means of S-LoRA's real trace",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the trace")


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """How often each row is measured, and where the results go."""
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row")
    parser.add_argument(
        "--first-run", type=int, default=0, help="its number, where several commands make the runs"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")


def runs_of(args: argparse.Namespace) -> range:
    """The numbers of the runs that the arguments ask for."""
    return range(args.first_run, args.first_run + args.repetitions)


def arrivals_of(args: argparse.Namespace, adapters: int) -> list[Arrival]:
    """The trace that the arguments describe."""
    zipf = args.popularity == "zipf"
    workload = Workload(
        adapters=adapters,
        rate=args.rate,
        seconds=args.duration,
        cv=args.cv,
        alpha=1.0 if zipf else args.alpha,
        zipf=args.alpha if zipf else None,
        longest=SETTINGS[args.setting].longest,
    )
    found = workload.arrivals(args.seed)
    return found if args.lengths == "uniform" else _arena_lengths(found, workload, args.seed)


def prompts_of(args: argparse.Namespace, arrivals: Sequence[Arrival]) -> list[list[int]]:
    """Random tokens, the same for all servers."""
    rng, vocab = np.random.default_rng(args.seed), SETTINGS[args.setting].config.vocab_size
    return [rng.integers(0, vocab, one.prompt).tolist() for one in arrivals]


def workload_fields(args: argparse.Namespace, adapters: int) -> dict[str, Any]:
    """A result's fields that say which trace it is of."""
    setting = SETTINGS[args.setting]
    named = ("setting", "rate", "duration", "popularity", "alpha", "cv", "lengths", "seed")
    given = {name: getattr(args, name) for name in named}
    return given | {"shape": setting.shape, "ranks": setting.ranks, "adapters": adapters}


def _arena_lengths(arrivals: Sequence[Arrival], workload: Workload, seed: int) -> list[Arrival]:
    rng = np.random.default_rng([seed, 1])

    def lengths(mean: float) -> list[int]:
        """Exponential below `longest`, with this mean: by inversion of the distribution."""
        scale = _scale(mean, workload.longest)
        below = -np.expm1(-workload.longest / scale)
        values = -scale * np.log1p(-below * rng.random(len(arrivals)))
        return np.clip(values.round().astype(int), 1, workload.longest - 1).tolist()

    columns = zip(arrivals, lengths(ARENA_PROMPT), lengths(ARENA_OUTPUT), strict=True)
    return [replace(one, prompt=prompt, output=output) for one, prompt, output in columns]


def _scale(mean: float, longest: float) -> float:
    """Of the exponential distribution that has this mean below `longest`."""
    low, high = mean, 64 * mean
    for _ in range(60):
        scale = (low + high) / 2
        too_low = scale - longest / np.expm1(longest / scale) < mean
        low, high = (scale, high) if too_low else (low, scale)
    return low
