# SPDX-License-Identifier: Apache-2.0
"""In which order waiting requests are tried: first come, last come, by priority.

A policy only proposes. Whether a request fits is the scheduler's to find out, and a request that
found no room often enough is overtaken no more, whatever the policy (`max_overtakes`).
"""

from collections.abc import Iterator, Sequence

from slora_jax.core import Rejection, Request, StepPlan
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.queue import WaitingQueue


class Policy:
    """First come, first served. What other policies change, they override."""

    def __init__(self, options: SchedulingOptions):
        self.options = options

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        """Waiting requests, the one to be admitted first in front.

        It is asked for the next one only after the last one was admitted (`slot` is set then, and
        `running` has it) or found no room.
        """
        yield from queue.oldest_first()

    def hopeless(self, queue: WaitingQueue, now: float) -> list[Rejection]:
        """Waiting requests that are to be turned away, and why."""
        return []

    def seniority(self, request: Request) -> float:
        """Preemption takes the batch's largest value, of equals the last admitted."""
        return 0.0

    def is_starved(self, request: Request) -> bool:
        """Whether nobody may be admitted past this request any more."""
        return request.overtaken >= self.options.max_overtakes

    # What happens, for those who keep books

    def arrived(self, request: Request, queue: WaitingQueue) -> None:
        """A new request is about to join the queue; `request.arrival` is set."""

    def admitted(self, request: Request, passed: Sequence[Request], queue: WaitingQueue) -> None:
        """A request is about to leave the queue for the batch, past some that found no room."""
        for other in passed:
            other.overtaken += 1

    def left(self, request: Request, queue: WaitingQueue) -> None:
        """A request is no longer in the queue: admitted, aborted or turned away."""

    def planned(self, plan: StepPlan) -> None:
        """A step is about to be dispatched."""


class LastComeFirstServed(Policy):
    """Newest first: under overload it serves those who have not waited yet.

    For a reward that only falls with the wait, serving the latest arrivals is optimal (S-LoRA,
    appendix B). Old requests starve while the overload lasts.
    """

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        yield from queue.newest_first()


class ByPriority(Policy):
    """A lower `priority` goes first, and a level is worth `priority_ageing_s` of waiting.

    So the order of any two requests never changes: by `arrival + priority * priority_ageing_s`,
    which is also whom preemption spares longest. No request starves: those who may overtake it
    must arrive within that many seconds.
    """

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        yield from sorted(queue.oldest_first(), key=self.seniority)

    def seniority(self, request: Request) -> float:
        return request.arrival + request.priority * self.options.priority_ageing_s
