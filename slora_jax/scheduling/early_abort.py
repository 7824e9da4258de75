# SPDX-License-Identifier: Apache-2.0
"""Early abort (S-LoRA, section 4.4): turn away at once whom the deadline would fail anyway."""

from collections.abc import Iterator, Sequence

from slora_jax.core import Rejection, Request
from slora_jax.scheduling.cost_model import CostModel
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.policies import Policy
from slora_jax.scheduling.queue import WaitingQueue


class SmoothedRate:
    """Events a second, counted in windows and smoothed exponentially.

    Args:
        window: seconds.
        smoothing: weight of the latest window.
    """

    def __init__(self, window: float, smoothing: float):
        self.value = 0.0
        self._window, self._smoothing = window, smoothing
        self._count = 0
        self._since: float | None = None

    def count(self, now: float) -> None:
        self.update(now)
        self._count += 1

    def update(self, now: float) -> None:
        """Closes the windows that are over."""
        if self._since is None:
            self._since = now
        closed = int((now - self._since) / self._window)
        if closed > 0:
            latest = self._smoothing * self._count / self._window
            self.value = latest + (1 - self._smoothing) * self.value
            self.value *= (1 - self._smoothing) ** (closed - 1)  # nothing happened in the others
            self._since += closed * self._window
            self._count = 0


class EarlyAbort(Policy):
    """Serves those whose first token can still come in time, and tells the others so.

    While more arrive than are admitted, the newest go first, who have most time left; else the
    oldest. A request is turned away once `slo_margin_s` and the predicted time to its first token
    reach beyond its deadline. One that has got a token is never turned away.

    Args:
        options: the SLO and the constants of the rates.
        cost_model: predicts steps; until it can, the margin alone counts.
        step_tokens: most tokens of a step.
    """

    def __init__(self, options: SchedulingOptions, cost_model: CostModel, step_tokens: int):
        super().__init__(options)
        self._cost_model = cost_model
        self._step_tokens = step_tokens
        rate = options.slo_rate_window_s, options.slo_rate_smoothing
        self.arrivals, self.admissions = SmoothedRate(*rate), SmoothedRate(*rate)
        self._now = 0.0

    @property
    def overloaded(self) -> bool:
        return self.arrivals.value > self.admissions.value

    def candidates(
        self, queue: WaitingQueue, running: Sequence[Request], now: float
    ) -> Iterator[Request]:
        yield from queue.newest_first() if self.overloaded else queue.oldest_first()

    def hopeless(self, queue: WaitingQueue, now: float) -> list[Rejection]:
        self._now = now
        self.arrivals.update(now)
        self.admissions.update(now)
        slo = self.options.slo_first_token_s
        step = self._cost_model.predict_next(self._step_tokens) or 0.0
        rejections = []
        for request in queue.oldest_first():
            steps = -(-len(request.prompt) // self._step_tokens)
            needed = self.options.slo_margin_s + steps * step
            waited = now - request.arrival
            if request.num_output == 0 and waited + needed >= slo:
                reason = (
                    f"overloaded: after {waited:.1f} s in the queue the first token would miss its "
                    f"deadline of {slo:g} s (slo_first_token_s); try again later"
                )
                rejections.append(Rejection(request, reason))
        return rejections

    def arrived(self, request: Request, queue: WaitingQueue) -> None:
        self.arrivals.count(request.arrival)

    def admitted(self, request: Request, passed: Sequence[Request], queue: WaitingQueue) -> None:
        super().admitted(request, passed, queue)
        if not request.num_preemptions:
            self.admissions.count(self._now)
