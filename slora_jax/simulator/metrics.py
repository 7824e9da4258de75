# SPDX-License-Identifier: Apache-2.0
"""What a simulated trace comes to, in S-LoRA's terms (section 7.1)."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slora_jax.simulator.simulation import Outcome, Served


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one trace under one policy.

    Attributes:
        requests, rejected, preemptions: how many.
        throughput: finished requests a second, the time until the last one ends included.
        tokens_per_s: their output tokens a second.
        first_token_s, first_token_p50_s, first_token_p99_s: latency from arrival to first token, of
            those that got one; the mean, the median, and what 99 % stay below.
        worst_wait_s: the longest wait for a first token.
        latency_s: mean time from arrival to the last token.
        slo_s: seconds in which a first token is due.
        attainment: share of all requests whose first token came in time.
        satisfaction: mean over all requests of `1 - (latency / slo_s)**2`, 0 for late or none.
        fairness: Jain's index of the adapters' attainments; 1: all alike.
        worst_adapter: attainment of the adapter that has least.
    """

    requests: int
    rejected: int
    preemptions: int
    throughput: float
    tokens_per_s: float
    first_token_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    worst_wait_s: float
    latency_s: float
    slo_s: float
    attainment: float
    satisfaction: float
    fairness: float
    worst_adapter: float


def measure(outcome: Outcome, slo_s: float) -> Metrics:
    """The figures of an outcome; `slo_s` is when first tokens are due, whatever the policy knew."""
    served = outcome.served
    waits = np.array([one.latency for one in served if one.latency is not None])
    finished = [one for one in served if one.finished is not None]
    latencies = [one.finished - one.arrival.time for one in finished if one.finished is not None]
    seconds = max(outcome.seconds, 1e-9)
    by_adapter = attainments(served, slo_s)
    some = len(waits) > 0
    return Metrics(
        requests=len(served),
        rejected=sum(one.rejected is not None for one in served),
        preemptions=outcome.preemptions,
        throughput=len(finished) / seconds,
        tokens_per_s=sum(one.arrival.output for one in finished) / seconds,
        first_token_s=float(waits.mean()) if some else 0.0,
        first_token_p50_s=float(np.quantile(waits, 0.5)) if some else 0.0,
        first_token_p99_s=float(np.quantile(waits, 0.99)) if some else 0.0,
        worst_wait_s=float(waits.max()) if some else 0.0,
        latency_s=float(np.mean(latencies)) if latencies else 0.0,
        slo_s=slo_s,
        attainment=float((waits < slo_s).sum()) / max(len(served), 1),
        satisfaction=float(np.maximum(1 - (waits / slo_s) ** 2, 0).sum()) / max(len(served), 1),
        fairness=jain(by_adapter.values()),
        worst_adapter=min(by_adapter.values(), default=1.0),
    )


def attainments(served: Iterable[Served], slo_s: float) -> dict[int | None, float]:
    """Each adapter's share of first tokens in time."""
    found: dict[int | None, list[bool]] = defaultdict(list)
    for one in served:
        found[one.arrival.adapter].append(one.latency is not None and one.latency < slo_s)
    return {adapter: sum(all_) / len(all_) for adapter, all_ in found.items()}


def jain(shares: Iterable[float]) -> float:
    """Jain's fairness index, `(Σx)² / (n Σx²)`: 1 if all are equal, 1/n if one has everything."""
    x = np.array(list(shares))
    square = float((x**2).sum())
    return float(x.sum()) ** 2 / (len(x) * square) if square > 0 else 1.0
