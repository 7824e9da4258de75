# SPDX-License-Identifier: Apache-2.0
"""Who asks for what, and when: S-LoRA's synthetic traces, and recorded ones in CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        time: seconds from the start.
        adapter: index of the adapter; None: the base model.
        prompt, output: tokens.
    """

    time: float
    adapter: int | None
    prompt: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A synthetic trace as S-LoRA makes it (section 7.1 and its `benchmarks/trace.py`).

    Attributes:
        adapters: n, how many there are; 0: all requests are for the base model.
        rate: R, requests a second.
        seconds: length of the trace: `rate * seconds` requests.
        cv: coefficient of variation of the times between arrivals, which are Gamma; 1: Poisson.
        alpha: an arrival's adapter is `power(alpha) * adapters`; 1: uniform, less: skewed.
        zipf: instead, the k-th adapter is asked for in proportion to `k ** -zipf`; None: not.
        shortest, longest: prompts and outputs are uniform in `[shortest, longest)` tokens.
    """

    adapters: int
    rate: float
    seconds: float
    cv: float = 1.0
    alpha: float = 1.0
    zipf: float | None = None
    shortest: int = 8
    longest: int = 512

    def __post_init__(self) -> None:
        checks = {
            "adapters": (self.adapters >= 0, "at least 0"),
            "rate": (self.rate > 0, "above 0"),
            "seconds": (self.rate * self.seconds >= 1, "long enough for one request"),
            "cv": (self.cv > 0, "above 0"),
            "alpha": (self.alpha > 0, "above 0"),
            "zipf": (self.zipf is None or self.zipf >= 0, "at least 0"),
            "shortest": (self.shortest >= 1, "at least 1"),
            "longest": (self.longest > self.shortest, f"above shortest ({self.shortest})"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def arrivals(self, seed: int = 0) -> list[Arrival]:
        """The trace; the same for the same seed."""
        rng = np.random.default_rng(seed)
        count = round(self.rate * self.seconds)
        gaps = rng.gamma(1 / self.cv**2, self.cv**2 / self.rate, count)
        times = np.cumsum(gaps) - gaps[:1]
        adapters = self.choose_adapters(rng, count)
        prompts = rng.integers(self.shortest, self.longest, count)
        outputs = rng.integers(self.shortest, self.longest, count)
        columns = (times.tolist(), adapters, prompts.tolist(), outputs.tolist())
        return [Arrival(*row) for row in zip(*columns, strict=True)]

    def choose_adapters(self, rng: np.random.Generator, count: int) -> list[int] | list[None]:
        """The adapters of so many requests, each drawn for itself."""
        if self.adapters == 0:
            return [None] * count
        if self.zipf is not None:
            shares = np.arange(1, self.adapters + 1) ** -self.zipf
            return rng.choice(self.adapters, count, p=shares / shares.sum()).tolist()
        return (rng.power(self.alpha, count) * self.adapters).astype(int).tolist()


class TraceError(ValueError):
    """A file is not a trace; the message names the file and the column or line."""


def read_trace(path: Path) -> list[Arrival]:
    """A recorded trace, in the format that its header says; all requests are adapter 0's.

    Azure's LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`) or BurstGPT
    (`Timestamp` in seconds, `Request tokens`, `Response tokens`; failures have none).

    Raises:
        TraceError: it is neither.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or ()
        columns, time_of = _AZURE if "ContextTokens" in header else _BURST_GPT
        missing = [name for name in columns if name not in header]
        if missing:
            raise TraceError(f"{path}: no column {missing[0]!r}; it has {reader.fieldnames}")
        rows = []
        for row in reader:
            line, (when, *tokens) = reader.line_num, (row[name] for name in columns)
            prompt, output = (int(_number(path, line, text)) for text in tokens)
            if prompt > 0 and output > 0:
                rows.append((time_of(path, line, when), prompt, output))
    rows.sort()
    start = rows[0][0] if rows else 0.0
    return [Arrival(time - start, 0, prompt, output) for time, prompt, output in rows]


def fitted_to(trace: Sequence[Arrival], workload: Workload, seed: int = 0) -> list[Arrival]:
    """A recorded trace with the adapters, rate and lengths of a synthetic one.

    The recorded arrivals keep their bursts: the first `rate * seconds` are taken, and the time
    between them stretched. Requests of `longest` tokens or more, in or out, are dropped, as S-LoRA
    does; adapters are drawn, as the recordings name none.
    """
    longest = workload.longest
    kept = [one for one in trace if max(one.prompt, one.output) < longest]
    kept = kept[: round(workload.rate * workload.seconds)]
    if len(kept) < 2 or kept[-1].time == kept[0].time:
        raise TraceError(f"the trace has {len(kept)} requests below {longest} tokens: too few")
    stretch = (len(kept) - 1) / workload.rate / (kept[-1].time - kept[0].time)
    adapters = workload.choose_adapters(np.random.default_rng(seed), len(kept))
    return [
        replace(one, time=(one.time - kept[0].time) * stretch, adapter=adapter)
        for one, adapter in zip(kept, adapters, strict=True)
    ]


def _number(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise TraceError(f"{path}, line {line}: {text!r} is no number") from None


def _seconds(path: Path, line: int, text: str) -> float:
    """Of a date with up to seven digits of a second."""
    try:
        whole, _, fraction = text.partition(".")
        digits = fraction.split("+")[0] or "0"
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{digits}")
    except ValueError:
        raise TraceError(f"{path}, line {line}: {text!r} is no date") from None


# Columns of the time, the prompt and the output, and how to read the time.
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _seconds
_BURST_GPT = ("Timestamp", "Request tokens", "Response tokens"), _number
