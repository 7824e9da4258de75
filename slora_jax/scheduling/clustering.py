# SPDX-License-Identifier: Apache-2.0
"""Adapter clustering (S-LoRA, section 4.3): few distinct adapters in the batch at a time.

Fewer adapters take fewer pages and fewer reads a step; a burst of one adapter is served together.
"""

from collections.abc import Iterator, Sequence

from slora_jax.core import Request
from slora_jax.scheduling.policies import Policy
from slora_jax.scheduling.queue import WaitingQueue


class AdapterClustering(Policy):
    """First come, first served, among those whose adapter the batch has, or has room for.

    A batch of `cluster_adapters` distinct adapters prefers requests for these. "soft" fills up with
    others where none of them waits; "hard" leaves the room empty. A request that was overtaken
    `max_overtakes` times, for want of room or for its adapter, is overtaken no more: "soft" admits
    it beyond the limit, "hard" admits nobody until one of the batch's adapters is done.

    Requests for the base model belong to every cluster.
    """

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        cluster = {request.adapter for request in running if request.adapter is not None}
        outside: list[Request] = []
        for request in queue.oldest_first():
            adapter = request.adapter
            full = len(cluster) >= self.options.cluster_adapters
            if adapter is not None and adapter not in cluster and full:
                outside.append(request)
                if self.is_starved(request):
                    break
                continue
            yield request
            if request.slot is not None:
                cluster |= {adapter} - {None}
                if any(map(self.is_starved, outside)):
                    break
        if self.options.cluster_mode == "soft":
            yield from outside

    def admitted(self, request: Request, passed: Sequence[Request], queue: WaitingQueue) -> None:
        """Counts for everybody who was there before, whatever they are waiting for."""
        for other in queue:
            if other is request:
                break
            other.overtaken += 1
