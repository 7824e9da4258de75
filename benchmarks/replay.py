# SPDX-License-Identifier: Apache-2.0
"""A trace, in real time, on whatever serves it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.trace_figures import RequestTimes
from slora_jax.simulator.workloads import Arrival


@dataclass(frozen=True, slots=True)
class Given:
    """A request got tokens in a step.

    Attributes:
        request_id: whose they are.
        tokens: how many.
        queue_seconds: that it waited before it first ran.
    """

    request_id: str
    tokens: int
    queue_seconds: float


class Serving(Protocol):
    """What serves."""

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def add(self, number: int, one: Arrival) -> str:
        """Queues the trace's request of this number; its id."""
        ...

    def step(self) -> Iterable[Given]:
        """Works for a moment."""
        ...


def replay(
    serving: Serving, arrivals: Sequence[Arrival], seconds: float, *, drain: bool
) -> tuple[list[RequestTimes], float]:
    """Serves a trace; requests come when they come, also when the server does not keep up.

    Args:
        serving: idle.
        arrivals: by time.
        seconds: when the run ends.
        drain: it ends when the last request has, instead.

    Returns:
        The times of all requests that came, and when the run ended.
    """
    served = [RequestTimes(one.time, one.output) for one in arrivals]
    added: dict[str, tuple[RequestTimes, float]] = {}
    arrived, start = 0, time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - start

    while (now := elapsed()) < seconds or drain:
        while arrived < len(arrivals) and arrivals[arrived].time <= now:
            request_id = serving.add(arrived, arrivals[arrived])
            added[request_id] = served[arrived], elapsed()
            arrived += 1
        if not serving.is_busy:
            if arrived == len(arrivals):
                break
            time.sleep(min(max(arrivals[arrived].time - elapsed(), 0.0), 1e-3))
            continue
        given = serving.step()
        now = elapsed()
        for one in given:
            times, came = added[one.request_id]
            if times.admitted is None:
                times.admitted = came + one.queue_seconds
            times.tokens += [now] * one.tokens
    return served[:arrived], elapsed()
