# SPDX-License-Identifier: Apache-2.0
"""What a step costs, predicted from tokens, context and ranks, and learnt while serving.

Linear in what the device reads and computes. Ranks count as a sum over the step's adapters, not as
the largest one times the batch: the kernels do no padding (Toppings, section 4, finds the same form
for MBGMV with R² 0.96).
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from slora_jax.core import StepPlan


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to do, as far as its time depends on it.

    Attributes:
        tokens: that go through the model, of prompts and of decodes.
        context: tokens whose keys and values are read, over all requests.
        rank_sum: over the distinct adapters in the step; 0: the base model only.
        installed_rank: over the adapters that are written into the pool before the step.
    """

    tokens: int
    context: int
    rank_sum: int
    installed_rank: int

    def features(self) -> tuple[float, ...]:
        """What the fields of `StepCost` are multiplied with, in their order."""
        has_lora = float(self.rank_sum > 0)
        return 1.0, self.tokens, self.context, has_lora, self.rank_sum, self.installed_rank


def step_load(plan: StepPlan, rank_of: Callable[[str], int]) -> StepLoad:
    """The load of a plan.

    Args:
        plan: the step.
        rank_of: an adapter's rank, by its id.
    """
    tokens = context = 0
    adapters = set()
    for row in plan.rows:
        length = len(row.tokens)
        tokens += length
        context += row.start + length
        adapters.add(row.request.adapter_id)
    adapters.discard(None)
    installed = sum(rank_of(install.adapter_id) for install in plan.installs)
    return StepLoad(tokens, context, sum(rank_of(one) for one in adapters if one), installed)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step: a fixed part, and so much more for each unit of a `StepLoad`."""

    step_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0
    lora_s: float = 0.0  # of a step with any adapter: launches
    rank_s: float = 0.0
    install_rank_s: float = 0.0

    def seconds(self, load: StepLoad) -> float:
        return (
            self.step_s
            + self.token_s * load.tokens
            + self.context_s * load.context
            + self.lora_s * (load.rank_sum > 0)
            + self.rank_s * load.rank_sum
            + self.install_rank_s * load.installed_rank
        )


_SCALE = np.array([1.0, 256.0, 16384.0, 1.0, 512.0, 64.0])  # features of about 1 each
_RIDGE = 1e-6  # holds down what the steps so far say nothing about


class CostModel:
    """A `StepCost` that follows the steps it is told of.

    Recursive least squares of the relative error, in information form, with forgetting. A step
    that took far longer than predicted (a compilation, a pause of the host) counts for little, as
    in Huber's loss. No cost is negative.

    Args:
        warm_up: steps before it predicts anything.
        forgetting: what an observation's weight is multiplied with at each later one.
        outlier: relative error from which a step's influence grows no more.
        refit_every: observations between two solutions of the equations.
    """

    def __init__(
        self,
        *,
        warm_up: int = 16,
        forgetting: float = 0.999,
        outlier: float = 0.3,
        refit_every: int = 16,
    ):
        self._warm_up, self._refit_every = warm_up, refit_every
        self._forgetting, self._outlier = forgetting, outlier
        self._information = np.zeros((len(_SCALE), len(_SCALE)))
        self._projection = np.zeros(len(_SCALE))
        self._first: list[tuple[StepLoad, float]] = []
        self._last: StepLoad | None = None
        self.num_observed = 0
        self.cost: StepCost | None = None  # None: not warmed up yet

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learns from a step."""
        if seconds <= 0:
            return
        self._last = load
        self.num_observed += 1
        if self.cost is None:
            self._first.append((load, seconds))
            if len(self._first) == self._warm_up:
                usual = statistics.median(seconds for _, seconds in self._first)
                for one, took in self._first:
                    self._add(one, took, usual)
                self.cost = self._solve()
            return
        self._add(load, seconds, max(self.cost.seconds(load), 1e-6))
        if self.num_observed % self._refit_every == 0:
            self.cost = self._solve()

    def predict(self, load: StepLoad) -> float | None:
        """Seconds that a step will take; None before it has warmed up."""
        return None if self.cost is None else self.cost.seconds(load)

    def predict_next(self, tokens: int) -> float | None:
        """The same for a step of so many tokens, with context and adapters as in the last one."""
        if self._last is None:
            return None
        return self.predict(StepLoad(tokens, self._last.context, self._last.rank_sum, 0))

    def _add(self, load: StepLoad, seconds: float, usual: float) -> None:
        x, y = np.array(load.features()) / _SCALE / usual, seconds / usual
        weight = min(1.0, self._outlier / max(abs(y - 1.0), 1e-9))
        self._information *= self._forgetting
        self._projection *= self._forgetting
        self._information += weight * np.outer(x, x)
        self._projection += weight * y * x

    def _solve(self) -> StepCost:
        """The least squares with no cost below 0: what would be negative is left out."""
        used = np.flatnonzero(np.diag(self._information))
        ridge = _RIDGE * np.trace(self._information)
        while True:
            a = self._information[np.ix_(used, used)] + ridge * np.eye(len(used))
            found = np.linalg.solve(a, self._projection[used])
            if len(found) == 0 or found.min() >= 0:
                break
            used = np.delete(used, found.argmin())
        cost = np.zeros(len(_SCALE))
        cost[used] = found / _SCALE[used]
        return StepCost(*cost.tolist())

    def as_dict(self) -> dict[str, float] | None:
        """The costs by name, for whoever wants to see them."""
        return None if self.cost is None else asdict(self.cost)
