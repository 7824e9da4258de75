# SPDX-License-Identifier: Apache-2.0
"""Constants of the Mosaic `skinny_matmul`, by GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pallas_kernels.layout import ceil_div, round_up
from pallas_kernels.mosaic import SHARED_BYTES

SPLITS = (1, 2, 4, 8)  # a portable cluster has at most 8 CTAs
ROWS = (64, 128, 192, 256)  # a TMA box has at most 256 rows
STEPS = (64, 128)
LEAST_STAGES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How the weights of one shape are dealt out.

    Attributes:
        rows: of W, and so outputs, of one CTA: 64 for each of its computing warpgroups.
        split: CTAs of a cluster, each with its part of the inputs of the same outputs.
        most_stages: steps that are in shared memory, or under way, at most.
        step: inputs of a step, a multiple of 64.
        stagger: tiles begin at different inputs, so that not all CTAs ask for the same columns of x
            at once, and for addresses of W that are one power of two apart.
    """

    rows: int
    split: int
    most_stages: int = 16
    step: int = 64
    stagger: bool = False

    def share(self, tokens: int) -> int:
        """Tokens whose sums each CTA of a cluster finishes; the last ones may have fewer, or none.

        A multiple of 8, the grain of a wgmma's columns and of the swizzle.
        """
        return round_up(ceil_div(tokens, self.split), 8)

    def columns(self, tokens: int) -> int:
        """Tokens, padded to whole shares."""
        return round_up(tokens, self.share(tokens))

    def stages(self, tokens: int) -> int:
        """Steps of 2-byte numbers that fit into shared memory beside the results."""
        exchanged = 4 * self.split if self.split > 1 else 0
        results = self.rows * self.share(tokens) * (2 + exchanged)
        of_step = (self.rows + self.columns(tokens)) * self.step * 2
        return min(self.most_stages, (SHARED_BYTES - results) // of_step)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `plan` weighs.

    Attributes:
        ctas: that run at once, by the CTAs of a cluster. One for each multiprocessor; fewer in
            large clusters, which don't fill the groups that multiprocessors come in.
        idle_cost: of a multiprocessor without a CTA, in shares of the time of one with: few of them
            saturate the memory, so less than 1.
        wave_cost: of each further wave of CTAs, in shares of the whole time.
        x_cost: of reading a byte of x from the L2 cache, in bytes of W.
        split_cost: of each further part of the inputs, in bytes of W for each byte of the result.
        step_cost: of steps of 64 inputs instead of 128, in shares of the whole time.
        plans: what was measured to be best, by `(outputs, inputs)`.
    """

    ctas: Mapping[int, int]
    idle_cost: float
    wave_cost: float
    x_cost: float
    split_cost: float
    step_cost: float
    plans: Mapping[tuple[int, int], Plan] = field(default_factory=dict)

    def plan(self, tokens: int, outputs: int, inputs: int) -> Plan:
        """The plan of a shape: the measured one, or the cheapest by a simple model."""
        measured = self.plans.get((outputs, inputs))
        if measured is not None and measured.stages(tokens) >= LEAST_STAGES:
            return measured

        def cost(plan: Plan) -> float:
            ctas = ceil_div(outputs, plan.rows) * plan.split
            waves = ceil_div(ctas, self.ctas[plan.split])
            room = waves * self.ctas[1]
            idle = self.idle_cost * (room / ctas - 1) + self.wave_cost * (waves - 1)
            padding = ceil_div(outputs, plan.rows) * plan.rows / outputs - 1
            x = self.x_cost * tokens / plan.rows
            exchange = self.split_cost * (plan.split - 1) * tokens / inputs
            return idle + padding + x + exchange + self.step_cost * (plan.step < max(STEPS))

        plans = [
            Plan(rows, split, step=step)
            for rows in ROWS
            for split in SPLITS
            for step in STEPS
            if inputs % step == 0 and split <= inputs // step
        ]
        return min((p for p in plans if p.stages(tokens) >= LEAST_STAGES), key=cost)


TUNING = {
    # us of 64 tokens. By their times, 32 clusters of 4 CTAs don't all run at once, nor 16 of 8, and
    # 22 of 4 do; how many of 8 do was not measured. So (4096, 4096): 64 rows split in 2 11.5, in
    # steps of 64 11.9, 128 rows in 4 21.9 (an earlier form, which took 13.7 for the first).
    # (12288, 4096): 128 rows 26.7, in steps of 64 28.1, 192 rows 28.7, split in 2 29.4.
    # (22016, 4096): 192 rows 45.5, in steps of 64 47.8, 64 rows 46.7, 256 47.8.
    # (4096, 11008): 64 rows split in 2 25.7, in steps of 64 26.5, 192 rows in 4 28.8.
    # The next projection's first weights prefetched into the L2 cache, early or late: no gain.
    "NVIDIA H200": Tuning(
        ctas={1: 132, 2: 132, 4: 88, 8: 64},
        idle_cost=0.5,
        wave_cost=0.2,
        x_cost=0.3,
        split_cost=3.0,
        step_cost=0.05,
        plans={
            (12288, 4096): Plan(128, 1, step=128),
            (4096, 4096): Plan(64, 2, step=128),
            (4096, 11008): Plan(64, 2, step=128),
            (22016, 4096): Plan(192, 1, step=128),
        },
    ),
}
