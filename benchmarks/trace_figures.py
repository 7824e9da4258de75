# SPDX-License-Identifier: Apache-2.0
"""From the times of a trace's requests to the figures that are compared.

The same for all servers: ours, vLLM's and PEFT's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SLO_S = 6.0  # in which S-LoRA wants a first token
WARM_UP_LATENCIES = 4.0  # the part before, and the part in, the steady window are so long at least


@dataclass(slots=True)
class RequestTimes:
    """A request, in seconds from the beginning of the trace.

    Attributes:
        arrival: when it came.
        output: tokens that it asked for.
        admitted: when it left the queue; None: it has not.
        tokens: when each of its tokens came.
    """

    arrival: float
    output: int
    admitted: float | None = None
    tokens: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.output


@dataclass(frozen=True, slots=True)
class SteadyWindow:
    """The part of a run in which as much is admitted as is finished.

    Attributes:
        start, end: seconds from the beginning of the trace.
        latency: mean seconds from admission to the last token. Time in the queue does not count:
            it grows with the run when more is offered than can be served.
    """

    start: float
    end: float
    latency: float

    @classmethod
    def of(cls, served: Sequence[RequestTimes], end: float) -> "SteadyWindow | None":
        """From four mean latencies on; None: the run ends before it has lasted four more."""
        done = [one for one in served if one.finished and one.admitted is not None]
        if not done:
            return None
        latency = float(np.mean([one.tokens[-1] - (one.admitted or 0.0) for one in done]))
        start = WARM_UP_LATENCIES * latency
        return cls(start, end, latency) if end - start >= start else None


def figures(served: Sequence[RequestTimes], end: float, arrivals_end: float) -> dict[str, Any]:
    """What a run comes to, under the names of the results' fields.

    Args:
        served: all requests that came.
        end: seconds of the run; what came later does not count.
        arrivals_end: when the last request came: the steady window ends there.

    Returns:
        Times in seconds or, as the names say, milliseconds. `attainment` and `satisfaction` are of
        all requests whose time for a first token, `SLO_S`, was over by the end; the steady figures
        are None where `SteadyWindow` is.
    """
    done = [one for one in served if one.finished]
    first = np.array([one.tokens[0] - one.arrival for one in served if one.tokens])
    gaps = np.array([b - a for one in served for a, b in itertools.pairwise(one.tokens)])
    per_token = [
        (one.tokens[-1] - one.tokens[0]) / (one.output - 1) for one in done if one.output > 1
    ]
    due = [one for one in served if one.arrival + SLO_S <= end]
    waits = np.array([one.tokens[0] - one.arrival if one.tokens else np.inf for one in due])
    tokens = sum(len(one.tokens) for one in served)
    found: dict[str, Any] = {
        "requests": len(served),
        "finished": len(done),
        "seconds": round(end, 2),
        "req_s": round(len(done) / end, 3),
        "out_tok_s": round(tokens / end, 1),
        "ttft_mean_s": _rounded(first.mean() if len(first) else None),
        "ttft_p50_s": _quantile(first, 0.5),
        "ttft_p99_s": _quantile(first, 0.99),
        "tpot_mean_ms": _rounded(1e3 * np.mean(per_token) if per_token else None),
        "itl_p50_ms": _quantile(1e3 * gaps, 0.5),
        "itl_p99_ms": _quantile(1e3 * gaps, 0.99),
        "e2e_mean_s": _rounded(
            np.mean([one.tokens[-1] - one.arrival for one in done]) if done else None
        ),
        "attainment": _rounded((waits < SLO_S).mean() if due else None),
        "satisfaction": _rounded(np.maximum(1 - (waits / SLO_S) ** 2, 0).mean() if due else None),
    }
    return found | _steady(served, SteadyWindow.of(served, min(end, arrivals_end)))


def _steady(served: Sequence[RequestTimes], window: SteadyWindow | None) -> dict[str, Any]:
    names = ("steady_from_s", "steady_to_s", "service_mean_s", "req_s_steady", "out_tok_s_steady")
    if window is None:
        return dict.fromkeys(names)
    start, end = window.start, window.end
    seconds = end - start
    ends = sum(one.finished and start <= one.tokens[-1] < end for one in served)
    tokens = sum(start <= when < end for one in served for when in one.tokens)
    values = (start, end, window.latency, ends / seconds, tokens / seconds)
    return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}


def _quantile(values: np.ndarray, share: float) -> float | None:
    return _rounded(np.quantile(values, share)) if len(values) else None


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)
