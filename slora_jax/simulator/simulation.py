# SPDX-License-Identifier: Apache-2.0
"""Runs a trace through the scheduler under a virtual clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from slora_jax.adapters.residency import AdapterCache
from slora_jax.core import Request, SamplingParams, StepPlan
from slora_jax.pool.allocator import PagePool
from slora_jax.scheduling.choice import make_policy
from slora_jax.scheduling.cost_model import CostModel, step_load
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.scheduler import Scheduler
from slora_jax.simulator.device import Server
from slora_jax.simulator.workloads import Arrival

_PARAMS = SamplingParams()
_TOKEN = 0  # all tokens look the same here


@dataclass(slots=True)
class Served:
    """What became of a request; times in seconds from the start, None: it did not happen."""

    arrival: Arrival
    first_token: float | None = None
    finished: float | None = None
    rejected: float | None = None

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival.time


@dataclass(slots=True)
class Outcome:
    """A simulated trace.

    Attributes:
        served: every request of the trace, in order of arrival.
        seconds: from the first arrival until all was done.
        steps: that the device did.
        tokens: that went through the model, recomputed ones included.
        preemptions: of running requests.
        installs: of adapters into the pool.
        cost_model: what the scheduler learnt of the device meanwhile.
    """

    served: list[Served]
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    installs: int = 0
    cost_model: CostModel = field(default_factory=CostModel)


def simulate(
    arrivals: Sequence[Arrival],
    ranks: Sequence[int],
    server: Server,
    options: SchedulingOptions,
) -> Outcome:
    """Serves a trace to its end.

    The host's loop is the engine's: the next step is planned when the last one's tokens have been
    read and the pending one begins, and the policy's cost model learns from the steps only.

    Args:
        arrivals: by time.
        ranks: adapter i has rank `ranks[i % len(ranks)]`.
        server: the device.
        options: of the scheduling.

    Raises:
        ValueError: a request would not even fit an empty pool, or the arrivals are not in order.
    """
    return _Simulation(arrivals, ranks, server, options).run()


class _Simulation:
    def __init__(
        self,
        arrivals: Sequence[Arrival],
        ranks: Sequence[int],
        server: Server,
        options: SchedulingOptions,
    ):
        if any(later.time < earlier.time for earlier, later in pairwise(arrivals)):
            raise ValueError("the arrivals are not in order of time")
        self._now = 0.0
        self._server = server
        asked = {one.adapter for one in arrivals} - {None}
        self._ranks = {str(i): ranks[i % len(ranks)] for i in asked if i is not None}
        pool = PagePool(server.num_pages)
        cache = AdapterCache(
            pool, max(len(self._ranks), 1), lambda name: server.adapter_pages(self._ranks[name])
        )
        self._outcome = Outcome([Served(one) for one in arrivals])
        self._scheduler = Scheduler(
            pool,
            cache,
            page_size=server.page_size,
            max_num_seqs=server.max_num_seqs,
            max_num_batched_tokens=server.max_num_batched_tokens,
            policy=make_policy(options, self._outcome.cost_model, server.max_num_batched_tokens),
            clock=lambda: self._now,
        )
        for one in arrivals:
            self._check_fits(one, pool.capacity)

    def _check_fits(self, one: Arrival, capacity: int) -> None:
        kv = -(-(one.prompt + one.output - 1) // self._server.page_size)
        rank = 0 if one.adapter is None else self._ranks[str(one.adapter)]
        needed = kv + self._server.adapter_pages(rank)
        if needed > capacity:
            raise ValueError(
                f"a request of {one.prompt} + {one.output} tokens needs {needed} pages with its "
                f"adapter, the pool has {capacity}"
            )

    def run(self) -> Outcome:
        outcome, scheduler = self._outcome, self._scheduler
        served = outcome.served
        by_id = {str(n): one for n, one in enumerate(served)}
        pending: StepPlan | None = None
        ends, arrived = 0.0, 0
        while True:
            while arrived < len(served) and served[arrived].arrival.time <= self._now:
                # The scheduler notices between two steps; latencies count from the arrival.
                scheduler.add(self._request(str(arrived), served[arrived].arrival))
                arrived += 1
            plan = scheduler.schedule()
            for rejection in scheduler.take_rejections():
                by_id[rejection.request.id].rejected = self._now
            if pending is not None:
                self._now = ends
                self._read(pending, by_id)
            elif plan is None:
                if arrived == len(served):
                    break
                self._now = max(self._now, served[arrived].arrival.time)
                continue
            if plan is not None:
                ends = self._now + self._dispatch(plan)
            pending = plan
        outcome.seconds = self._now
        outcome.preemptions = scheduler.num_preemptions
        assert all(one.finished or one.rejected is not None for one in served), "a request is lost"
        return outcome

    def _request(self, name: str, one: Arrival) -> Request:
        adapter = None if one.adapter is None else str(one.adapter)
        prompt = [_TOKEN] * one.prompt
        return Request(
            id=name,
            prompt=prompt,
            params=_PARAMS,
            adapter=adapter,
            adapter_id=adapter,
            max_output=one.output,
        )

    def _dispatch(self, plan: StepPlan) -> float:
        """Seconds that the step takes."""
        load = step_load(plan, self._ranks.__getitem__)
        seconds = self._server.cost.seconds(load)
        outcome = self._outcome
        outcome.cost_model.observe(load, seconds)
        outcome.steps += 1
        outcome.tokens += load.tokens
        outcome.installs += len(plan.installs)
        return seconds

    def _read(self, plan: StepPlan, by_id: dict[str, Served]) -> None:
        for row in plan.rows:
            if not row.samples:
                continue
            request = row.request
            request.in_flight -= 1
            output = request.output
            output.append(_TOKEN)
            if len(output) == 1:
                by_id[request.id].first_token = self._now
            if len(output) == request.max_output:
                by_id[request.id].finished = self._now
                self._scheduler.finish(request)
