# SPDX-License-Identifier: Apache-2.0
"""Times the operations on the shapes of real models, beside what the device could do at best.

python -m benchmarks.kernels --quick --output benchmarks/results/kernels.jsonl

Lines of JSON go to standard output (and `--output`), progress to standard error. `limit_us` is the
time that the least traffic and arithmetic take at the ceilings measured in the same run; `ratio` is
`limit_us / us`. `device_us` is what the kernels take by the profiler, without gaps between them:
less than `us` where a host takes longer to launch them. Some rows are also measured with XLA's
reference. vLLM's Triton kernels for LoRA are no rival here: they can only be called where vLLM is
installed, which no dependency asks for.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp

from benchmarks.attention_problems import Decode, Mixed, Prefill, Rope
from benchmarks.device_profile import busy_us
from benchmarks.measure import Ceilings, Timing, measure
from benchmarks.problems import Problem, Program, Size
from benchmarks.projection_problems import PROJECTIONS, Lora, Matmul, MixedLora
from benchmarks.record import Recorder, say
from benchmarks.shapes import KERNEL_SHAPES
from pallas_kernels.backend import Backend, why_not_mosaic, why_not_triton
from pallas_kernels.layout import PageLayout

PROMPT = 4096  # tokens of a long prefill
MIXED_RANKS = (64,) * 16 + (32,) * 16 + (16,) * 16 + (8,) * 16


@dataclass(frozen=True)
class Case:
    """A problem, and why it is measured.

    Attributes:
        target: a row of the table that the kernels are made to meet.
        reference: XLA's implementation is measured, too.
        base: the base model's part of the same projection, to be compared with.
    """

    problem: Problem
    target: bool = False
    reference: bool = False
    base: Matmul | None = None

    def has(self, backend: Backend) -> bool:
        """Whether there is something of that backend's to measure."""
        if backend == "triton":  # projections are XLA's there
            return not isinstance(self.problem, Matmul)
        return backend == "mosaic" or self.reference


def target_cases() -> Iterator[Case]:
    mha, gqa = (
        {"model": name, "shape": KERNEL_SHAPES[name]} for name in ("llama-2-7b", "llama-3-8b")
    )
    yield Case(Decode(**mha, batch=64, context=2048), target=True, reference=True)
    yield Case(Decode(**mha, batch=64, context=320), target=True)
    yield Case(Decode(**gqa, batch=64, context=2048), target=True)
    yield Case(Decode(**gqa, batch=8, context=8192), target=True)
    yield Case(Prefill(**gqa, tokens=PROMPT), target=True, reference=True)
    distinct = Lora(**mha, projection="qkv", ranks=(16,) * 64, each=1)
    yield Case(distinct, target=True, reference=True)
    yield Case(Lora(**mha, projection="qkv", ranks=MIXED_RANKS, each=1), target=True)
    yield Case(Lora(**mha, projection="qkv", ranks=(16,), each=64), target=True)
    base = Matmul(**mha, projection="qkv", tokens=PROMPT)
    prompts = Lora(**mha, projection="qkv", ranks=(16,) * 8, each=PROMPT // 8)
    yield Case(prompts, target=True, reference=True, base=base)


def other_cases() -> Iterator[Case]:
    for model, shape in KERNEL_SHAPES.items():
        which: dict[str, Any] = {"model": model, "shape": shape}
        for context in (320, 2048):
            yield Case(Decode(**which, batch=64, context=context))
        yield Case(Prefill(**which, tokens=PROMPT))
        yield Case(Prefill(**which, tokens=PROMPT, requests=8))
        for tokens in (64, PROMPT):
            yield Case(Rope(**which, tokens=tokens), reference=True)
        for projection in PROJECTIONS:
            yield Case(Matmul(**which, projection=projection, tokens=64), reference=True)
            yield Case(Lora(**which, projection=projection, ranks=(16,) * 64, each=1))
        yield Case(Lora(**which, projection="qkv", ranks=(16,) * 8, each=PROMPT // 8))


def mixed_cases() -> Iterator[Case]:
    """Steps of a busy server: half of the tokens are a prompt's."""
    mha: dict[str, Any] = {"model": "llama-2-7b", "shape": KERNEL_SHAPES["llama-2-7b"]}
    yield Case(Mixed(**mha, decodes=240, context=390, prompt=272), reference=True)
    for projection in ("qkv", "o"):
        base = Matmul(**mha, projection=projection, tokens=512)
        for ranks in ((8,) * 241, MIXED_RANKS * 3 + (64,) * 49):
            lora = MixedLora(**mha, projection=projection, ranks=ranks, each=1, prompt=272)
            yield Case(lora, base=base)
        for adapters, each in ((80, 3), (20, 12), (4, 60)):
            shape = {"ranks": (8,) * (adapters + 1), "each": each, "prompt": 272}
            yield Case(MixedLora(**mha, projection=projection, **shape), base=base)


def cases() -> list[Case]:
    """All cases, each once, those of the target table first."""
    targets = list(target_cases())
    known = {case.problem for case in targets}
    others = (*mixed_cases(), *other_cases())
    return targets + [case for case in others if case.problem not in known]


class Benchmark:
    """Measures cases and records them.

    Args:
        recorder: of results.
        limits: of the device.
        size: of a measured program; XLA's references, some of them slow, get shorter ones.
        repetitions: of a measurement.
    """

    def __init__(self, recorder: Recorder, limits: Ceilings, size: Size, repetitions: int):
        self._recorder = recorder
        self._limits = limits
        self._size = size
        self._repetitions = repetitions
        self._known: dict[tuple[Problem, Backend], Timing] = {}
        self.failures = 0

    def run(self, case: Case, backend: Backend) -> None:
        """Measures a case; one that fails is told and counted, and stops no other."""
        problem, fields = case.problem, {}
        try:
            if case.base is not None:
                self.run(Case(case.base, target=case.target), "xla")
                fields["base_us"] = round(self._known[case.base, "xla"].us, 3)
            if (problem, backend) in self._known:
                return
            say(f"{problem.op}: {problem.name} ({problem.model}, {backend})")
            timing, device_us = self._measure(problem, backend)
            self._known[problem, backend] = timing
            if device_us is not None:
                fields["device_us"] = round(device_us, 3)
        except Exception as error:  # of a compiler or a device: anything
            self.failures += 1
            say(f"FAILED: {type(error).__name__}: {str(error)[:500]}")
            return
        if case.base is not None:
            fields["of_base"] = round(timing.us / fields["base_us"], 3)
        parameters = {name: v for name, v in asdict(problem).items() if name != "shape"}
        self._recorder.add(
            problem.op,
            timing,
            problem.work,
            self._limits.limit_us(problem.work),
            case=problem.name,
            target=case.target,
            backend=backend,
            **parameters,
            **fields,
        )

    def _measure(self, problem: Problem, backend: Backend) -> tuple[Timing, float | None]:
        length = self._size.length if backend != "xla" else max(self._size.length // 4, 1)
        size = Size(length, self._size.data_bytes)
        timing, device_us = self._of_one(problem.program(backend, size), length)
        overhead = problem.overhead(size)
        if overhead is None:
            return timing, device_us
        less, device_less = self._of_one(overhead, length)
        if device_us is not None and device_less is not None:
            device_us -= device_less
        return timing.without(less.us), device_us

    def _of_one(self, program: Program, length: int) -> tuple[Timing, float | None]:
        call, carry = program
        device_us, carry = busy_us(call, carry)
        timing = measure(call, carry, repetitions=self._repetitions).each(length)
        return timing, None if device_us is None else device_us / length


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", help="of operation, model and case")
    parser.add_argument("--quick", action="store_true", help="only the target table")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try it on a CPU")
    parser.add_argument(
        "--backend",
        type=backends,
        default=["mosaic", "xla"],
        metavar="NAME,…",
        help="triton, mosaic or xla, side by side; XLA where the table asks for it",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="to append the results to")
    args = parser.parse_args(argv)

    chosen = [case for case in cases() if case.target or not args.quick]
    if args.only:
        names = {case: f"{c.op} {c.model} {c.name}" for case in chosen for c in [case.problem]}
        chosen = [case for case in chosen if re.search(args.only, names[case])]
    recorder = Recorder(args.output)
    limits = recorder.ceilings(small=args.smoke)
    size = Size(2, 1) if args.smoke else Size(64, 10**9)
    benchmark = Benchmark(recorder, limits, size, repetitions=3 if args.smoke else 5)
    usable: list[Backend] = []
    asked: list[Backend] = ["xla"] if args.smoke else args.backend
    for backend in asked:
        if reason := why_not(backend):
            say(f"without {backend}: {reason}")
        else:
            usable.append(backend)
    for case in chosen:
        for backend in usable:
            if case.has(backend) or usable == ["xla"]:
                benchmark.run(tiny(case) if args.smoke else case, backend)
    return 1 if benchmark.failures else 0


def backends(text: str) -> list[Backend]:
    """The value of `--backend`."""
    known: dict[str, Backend] = {name: name for name in get_args(Backend)}
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"no backend {name!r}: there are {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def why_not(backend: Backend) -> str | None:
    """What keeps a backend from being measured on this machine; None: nothing."""
    model = {"dtype": jnp.bfloat16, "layout": PageLayout(8, 128, 16)}
    reasons = {"mosaic": why_not_mosaic, "triton": why_not_triton}
    return reasons[backend](**model) if backend in reasons else None


def tiny(case: Case) -> Case:
    """The same on a small shape."""
    base = case.base.tiny() if case.base is not None else None
    return Case(case.problem.tiny(), case.target, case.reference, base)


if __name__ == "__main__":
    raise SystemExit(main())
