# SPDX-License-Identifier: Apache-2.0
"""Finds constants of Triton's LoRA kernels for the GPU at hand.

python -m benchmarks.tune_lora

One constant after the other is changed, and what makes the kernels faster is kept, until nothing
does. The last line says what is best as a line of `TUNING` in `pallas_kernels/lora_triton.py`; the
others, in JSON, what every try took on the device, by the profiler: a host may need longer to
launch the shortest kernels than they run. Only where a launch is what is saved, both halves in one,
the clock decides.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_profile import busy_us
from benchmarks.kernels import target_cases, why_not
from benchmarks.measure import measure
from benchmarks.problems import Program, Size, program
from benchmarks.projection_problems import DECODE_TOKENS, Lora
from benchmarks.record import say

# By what is launched, and of how many tokens: constants that those of later lines do not change.
CHOICES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("shrink", "single"): {
        "shrink_parts": (1, 2, 4),
        "shrink_warps": (1, 2, 4),
        "shrink_tiles": (1, 2, 4),
    },
    ("expand", "single"): {
        "expand_warps": (1, 2, 4),
        "expand_tiles": (1, 2),
        "expand_slabs": (1, 2, 4),
    },
    ("both", "single"): {
        "whole_tiles": (2, 4, 8),
        "whole_slabs": (1, 2),
        "whole_ranks": (0, 16, 32, 256),
    },
    ("shrink", "block"): {
        "block_parts": (1, 2, 4),
        "block_tokens": (16, 32, 64),
        "block_inputs": (64, 128, 256),
        "block_shrink_warps": (4, 8),
        "stages": (2, 3, 4),
        "block_shrink_ranks": (16, 32, 64),
    },
    ("expand", "block"): {
        "block_outputs": (64, 128, 256),
        "block_spans": (1, 4, 8, 16),
        "block_expand_stages": (1, 2, 3, 4),
        "block_expand_warps": (2, 4, 8),
        "block_expand_ranks": (16, 32, 64),
    },
}


def descend(
    start: Any, choices: Mapping[str, Sequence[int]], cost: Callable[[Any], float]
) -> tuple[Any, float]:
    """The cheapest that changing one field after the other finds, and its cost.

    Args:
        start: a dataclass.
        choices: values of its fields.
        cost: is asked once of each; infinite where something cannot be.
    """
    known: dict[Any, float] = {}

    def ask(one: Any) -> float:
        if one not in known:
            known[one] = cost(one)
        return known[one]

    best, before = start, None
    while best != before:
        before = best
        for name, values in choices.items():
            tries = [replace(best, **{name: value}) for value in values]
            best = min((best, *tries), key=ask)
    return best, ask(best)


def half_program(problem: Lora, half: str, tuning: Any, size: Size) -> Program:
    """One half of a problem, or `both`, many times in a row."""
    from pallas_kernels import lora_triton  # needs the extra

    pool, adapters, x, y = problem.data(size)
    modules, max_rank = problem.modules, max(problem.ranks)
    parts = tuning.shrink_parts if problem.tokens <= DECODE_TOKENS else tuning.block_parts
    h = jnp.ones((problem.tokens, modules.count, parts, max_rank), jnp.float32)
    static = {"modules": modules, "layout": problem.layout, "tuning": tuning}

    def shrink(y, layer, x, pool, adapters):
        found = []  # of every list, as a result: what is no result is left out
        for work in adapters.work:
            where = pool, layer, work, adapters.pages
            found.append(lora_triton.shrink(x, *where, max_rank=max_rank, **static))
        return y, found

    def expand(y, layer, h, pool, adapters):
        for work in adapters.work:
            y = lora_triton.expand(y, h, pool, layer, work, adapters.pages, **static)
        return y, None

    def both(y, layer, x, pool, adapters):
        for work in adapters.work:
            where = pool, layer, work, adapters.pages
            y = lora_triton.delta(x, y, *where, max_rank=max_rank, **static)
        return y, None

    if half == "both":
        return program(both, y, len(pool), x, pool, adapters, size=size)
    if half == "shrink":
        return program(shrink, y, len(pool), x, pool, adapters, size=size)
    return program(expand, y, len(pool), h, pool, adapters, size=size)


def half_us(problem: Lora, half: str, tuning: Any, size: Size) -> float:
    """Of one of the operations of `half_program`, on the device; of both halves by the clock."""
    call, carry = half_program(problem, half, tuning, size)
    if half == "both":
        return measure(call, carry).each(size.length).us
    us, _ = busy_us(call, carry)
    assert us is not None
    return us / size.length


def problems(kind: str) -> Iterator[Lora]:
    """Of single tokens or blocks of them."""
    for problem in (case.problem for case in target_cases()):
        if isinstance(problem, Lora) and (problem.tokens <= DECODE_TOKENS) == (kind == "single"):
            yield problem


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32, help="operations of a program")
    args = parser.parse_args(argv)
    if reason := why_not("triton"):
        parser.error(f"Triton's kernels cannot run here: {reason}")
    from pallas_kernels.lora_triton import TUNING
    from pallas_kernels.triton import tuned

    size, best = Size(args.length, 10**9), tuned(TUNING)
    for (half, kind), choices in CHOICES.items():
        say(f"{half} of {kind}s")
        first: dict[Lora, float] = {}

        def cost(tuning: Any, half=half, kind=kind, choices=choices, first=first) -> float:
            """The mean of the problems' times, as shares of the first ones."""
            total = 0.0
            for problem in problems(kind):
                line = {"half": half, "case": problem.name, "device": jax.devices()[0].device_kind}
                line |= {name: getattr(tuning, name) for name in choices}
                try:
                    us = half_us(problem, half, tuning, size)
                except Exception as error:  # of a compiler: too large for this card, say
                    print(json.dumps(line | {"error": str(error)[:200]}), flush=True)
                    return float("inf")
                print(json.dumps(line | {"us": round(us, 2)}), flush=True)
                total += us / first.setdefault(problem, us)
            return total / len(first)

        if half == "both":  # from one program on: else nothing tells how large it is best
            cost(best)  # what the shares are of
            best = replace(best, whole_ranks=max(choices["whole_ranks"]))
        best, share = descend(best, choices, cost)
        say(f"{100 * share:.0f} % of what it took")
    arguments = ", ".join(f"{name}={value}" for name, value in asdict(best).items())
    print(f"Tuning({arguments})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
