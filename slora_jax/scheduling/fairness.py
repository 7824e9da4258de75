# SPDX-License-Identifier: Apache-2.0
"""Equal service for every adapter: the virtual token counter (Sheng et al., OSDI 2024)."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from slora_jax.core import Request, StepPlan
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.policies import Policy
from slora_jax.scheduling.queue import WaitingQueue


class VirtualTokenCounter(Policy):
    """The adapter that was served least goes next; among its own requests, the oldest.

    An adapter's counter grows by its tokens, prompts at admission and outputs as they are sampled,
    weighed and divided by the adapter's weight. An adapter that comes back after a pause starts
    no lower than those that wait: a pause earns no credit. The base model is one adapter more.
    """

    def __init__(self, options: SchedulingOptions):
        super().__init__(options)
        self.counters: dict[str | None, float] = {}
        self._waiting: Counter[str | None] = Counter()
        self._last_left: str | None = None

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        lines: dict[str | None, deque[Request]] = {}
        for request in queue.oldest_first():
            lines.setdefault(request.adapter, deque()).append(request)
        while lines:
            adapter = min(lines, key=self.counters.__getitem__)
            request = lines[adapter].popleft()
            yield request
            if request.slot is None or not lines[adapter]:
                del lines[adapter]  # what is behind a request without room waits as well

    def arrived(self, request: Request, queue: WaitingQueue) -> None:
        adapter = request.adapter
        own = self.counters.get(adapter, 0.0)
        if not self._waiting[adapter]:
            active = [self.counters[name] for name, count in self._waiting.items() if count]
            floor = min(active, default=self.counters.get(self._last_left, 0.0))
            own = max(own, floor)
        self.counters[adapter] = own
        self._waiting[adapter] += 1

    def admitted(self, request: Request, passed: Sequence[Request], queue: WaitingQueue) -> None:
        super().admitted(request, passed, queue)
        if not request.num_preemptions:  # computing it again is no service to the adapter
            self._serve(request.adapter, self.options.vtc_input_weight * len(request.prompt))

    def left(self, request: Request, queue: WaitingQueue) -> None:
        if not request.num_preemptions:  # a preempted one waits, but brings no counter back
            self._waiting[request.adapter] -= 1
            self._last_left = request.adapter

    def planned(self, plan: StepPlan) -> None:
        for adapter, count in Counter(r.request.adapter for r in plan.rows if r.samples).items():
            self._serve(adapter, self.options.vtc_output_weight * count)

    def _serve(self, adapter: str | None, service: float) -> None:
        weights = self.options.vtc_adapter_weights or {}
        weight = weights.get(adapter, 1.0) if adapter is not None else 1.0
        self.counters[adapter] += service / weight
