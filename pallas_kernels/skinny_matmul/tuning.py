# SPDX-License-Identifier: Apache-2.0
"""Constants of the Mosaic `skinny_matmul`, by GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pallas_kernels.layout import ceil_div, round_up
from pallas_kernels.mosaic import SHARED_BYTES

SPLITS = (1, 2, 4, 8)  # a portable cluster has at most 8 CTAs
ROWS = (64, 128, 192, 256)  # a TMA box has at most 256 rows
GATED_ROWS = (128, 256, 384)
STEPS = (64, 128)
LEAST_STAGES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How the weights of one shape are dealt out.

    Attributes:
        rows: of W, and so outputs, of one CTA: 64 for each of its computing warpgroups. Where W is
            gated, 64 of either half.
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
    gated: bool = False

    @property
    def outputs(self) -> int:
        """Columns of y of one CTA."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def whole(self) -> bool:
        """Whether each sum is one of all inputs, in their order."""
        return self.split == 1 and not self.stagger

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
        results = self.outputs * self.share(tokens) * (2 + exchanged)
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
        gated: the same of gated weights.
    """

    ctas: Mapping[int, int]
    idle_cost: float
    wave_cost: float
    x_cost: float
    split_cost: float
    step_cost: float
    plans: Mapping[tuple[int, int], Plan] = field(default_factory=dict)
    gated: Mapping[tuple[int, int], Plan] = field(default_factory=dict)

    def plan(
        self, tokens: int, outputs: int, inputs: int, *, gated: bool = False, whole: bool = False
    ) -> Plan:
        """The plan of a shape: the measured one, or the cheapest by a simple model.

        Gated weights are not split: the parts of two sums would have to be exchanged.

        Args:
            whole: nor are these, see `Plan.whole`.
        """
        whole = whole or gated
        measured = (self.gated if gated else self.plans).get((outputs, inputs))
        if (
            measured is not None
            and measured.stages(tokens) >= LEAST_STAGES
            and (measured.whole or not whole)
        ):
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
            Plan(rows, split, step=step, gated=gated)
            for rows in (GATED_ROWS if gated else ROWS)
            for split in (SPLITS[:1] if whole else SPLITS)
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
    # (22016, 4096) gated, with the launch between them 49.0 if done by XLA: 256 rows in steps of 64
    # 47.6, 128 rows with 4 stages, of which a multiprocessor holds two, 47.4 (more than 64 tokens
    # would leave it one), with 8 51.8, 384 rows 61.2.
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
        gated={(22016, 4096): Plan(256, 1, step=64, gated=True)},
    ),
}
