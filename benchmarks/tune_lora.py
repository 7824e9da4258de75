# SPDX-License-Identifier: Apache-2.0
"""Finds constants of Triton's LoRA kernels for the GPU at hand.

python -m benchmarks.tune_lora

One constant after the other is changed, and what makes the kernels faster is kept, until nothing
does. The last line says what is best as a line of `TUNING` in `pallas_kernels/lora_triton.py`; the
others, in JSON, what every try took on the device, by the profiler: a host may need longer to
launch the shortest kernels than they run. Only where a launch is what is saved, a single token's
halves in one, the clock decides. There the same kernels took 10 to 16 us in one try or another:
what is found of `whole_*` should be found again before it is believed.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_profile import busy_us
from benchmarks.kernels import target_cases, why_not
from benchmarks.measure import measure
from benchmarks.problems import Program, Size, program
from benchmarks.projection_problems import DECODE_TOKENS, Lora
from benchmarks.record import say
from pallas_kernels.segments import Adapters

# Constants, by what is launched, and of how many tokens, to find them one line after the other.
CHOICES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("shrink", "single"): {
        "shrink_parts": (1, 2, 4, 8),
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
        "whole_columns": (4096, 16384),
        "whole_programs": (1, 192, 768),
    },
    ("shrink", "block"): {
        "block_tokens": (16, 32, 64),
        "block_inputs": (64, 128, 256),
        "block_shrink_warps": (4, 8),
        "stages": (2, 3, 4, 5),
        "block_shrink_ranks": (16, 32, 64),
    },
    ("expand", "block"): {
        "block_outputs": (64, 128, 256),
        "block_expand_warps": (2, 4, 8),
        "block_expand_ranks": (16, 32, 64),
    },
    ("both", "block"): {  # what shrinks in parts is expanded from them: slower, of many
        "block_parts": (1, 2, 4, 8),
        "block_programs": (64, 128, 256),
    },
}
GAIN = 0.01  # of the time: what gains less may be noise


def descend(
    start: Any, choices: Mapping[str, Sequence[int]], cost: Callable[[Any], float]
) -> tuple[Any, float]:
    """The cheapest that changing one field after the other finds, and its cost.

    A change is kept if it gains `GAIN`.

    Args:
        start: a dataclass.
        choices: values of its fields.
        cost: is asked once of each; infinite where something cannot be.
    """
    ask = cache(cost)
    best, before = start, None
    while best != before:
        before = best
        for name, values in choices.items():
            found = min((replace(best, **{name: value}) for value in values), key=ask)
            if ask(found) < (1 - GAIN) * ask(best):
                best = found
    return best, ask(best)


type Data = tuple[jax.Array, Adapters, jax.Array, jax.Array]  # see `Lora.data`


def half_program(problem: Lora, data: Data, half: str, tuning: Any, size: Size) -> Program:
    """One half of a problem, or `both`, many times in a row."""
    from pallas_kernels import lora_triton  # needs the extra

    pool, adapters, x, y = data
    static = {"modules": problem.modules, "layout": problem.layout, "tuning": tuning}
    ranked: dict[str, Any] = static | {"max_rank": max(problem.ranks)}

    def shrink(y, layer, x, pool, adapters):
        each = [
            lora_triton.shrink(x, pool, layer, work, adapters.pages, **ranked)
            for work in adapters.work
        ]
        return y, each  # as a result: what is no result is left out

    def expand(y, layer, each, pool, adapters):
        for work, h in zip(adapters.work, each, strict=True):
            y = lora_triton.expand(y, h, pool, layer, work, adapters.pages, **static)
        return y, None

    def both(y, layer, x, pool, adapters):
        for work in adapters.work:
            y = lora_triton.delta(x, y, pool, layer, work, adapters.pages, **ranked)
        return y, None

    one = {"shrink": shrink, "expand": expand, "both": both}[half]
    given: Any = x
    if half == "expand":
        _, shapes = jax.eval_shape(shrink, y, jnp.int32(0), x, pool, adapters)
        given = [jnp.ones(h.shape, h.dtype) for h in shapes]
    return program(one, jnp.copy(y), len(pool), given, pool, adapters, size=size)


def half_us(problem: Lora, data: Data, half: str, tuning: Any, size: Size) -> float:
    """Of one of the operations of `half_program`."""
    call, carry = half_program(problem, data, half, tuning, size)
    if half == "both" and problem.tokens <= DECODE_TOKENS:
        return measure(call, carry).each(size.length).us_min
    us, _ = busy_us(call, carry)
    assert us is not None
    return us / size.length


def problems(kind: str) -> list[Lora]:
    """Of single tokens or blocks of them: of the target table, and what differs most from them."""
    targets = [case.problem for case in target_cases() if isinstance(case.problem, Lora)]
    first, *_ = own = [
        one for one in targets if (one.tokens <= DECODE_TOKENS) == (kind == "single")
    ]
    if kind == "single":  # one module instead of three; three times the columns of x
        return [*own, replace(first, projection="o"), replace(first, projection="down")]
    large, short = (64,) * len(first.ranks), first.ranks[:1]
    return [*own, replace(first, ranks=large), replace(first, ranks=short)]


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
        data = cache(partial(Lora.data, size=size))  # for all that is tried, but not for all halves

        @cache
        def cost(tuning: Any, half=half, kind=kind, choices=choices, first=first, data=data):
            """The mean of the problems' times, as shares of the first ones."""
            total = 0.0
            for problem in problems(kind):
                line = {"half": half, "case": problem.name, "device": jax.devices()[0].device_kind}
                line |= {name: getattr(tuning, name) for name in choices}
                try:
                    us = half_us(problem, data(problem), half, tuning, size)
                except Exception as error:  # of a compiler: too large for this card, say
                    print(json.dumps(line | {"error": str(error)[:200]}), flush=True)
                    return float("inf")
                print(json.dumps(line | {"us": round(us, 2)}), flush=True)
                total += us / first.setdefault(problem, us)
            return total / len(first)

        if cost(best) == float("inf"):  # what the shares are of
            parser.error(f"{half} of {kind}s cannot be measured: see the last line")
        if (half, kind) == ("both", "single"):  # else nothing tells how large it is best
            best = replace(best, whole_ranks=max(choices["whole_ranks"]))
        best, share = descend(best, choices, cost)
        say(f"{100 * share:.0f} % of what it took")
    arguments = ", ".join(f"{name}={value}" for name, value in asdict(best).items())
    print(f"Tuning({arguments})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
