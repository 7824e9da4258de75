# SPDX-License-Identifier: Apache-2.0
"""What is chosen for a GPU by its compute capability, and for the versions that are installed."""

import importlib
import importlib.util
import sys
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

if not importlib.util.find_spec("jax_triton"):
    pytest.skip("needs the extra triton", allow_module_level=True)

from benchmarks.problems import Size
from benchmarks.tune_lora import CHOICES, half_program, problems
from pallas_kernels import lora_triton, triton
from pallas_kernels.backend import why_not_triton
from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_triton import Tuning


@pytest.fixture
def capability(monkeypatch):
    def compile_for(number):
        monkeypatch.setattr(triton, "INTERPRETED", False)
        monkeypatch.setattr(triton, "_capability", lambda: number)

    return compile_for


@pytest.mark.parametrize(
    ("number", "line"), [(80, "a"), (86, "a"), (89, "b"), (90, "c"), (120, "c"), (75, "a")]
)
def test_constants_of_the_last_generation_before(capability, number, line):
    capability(number)
    assert triton.tuned({80: "a", 89: "b", 90: "c"}) == line


@pytest.mark.parametrize(
    ("number", "found"),
    [(80, 3), (86, 2), (89, 2), (90, 3), (87, 3), (123, 2)],  # the last one nobody knows yet
)
def test_stages_that_shared_memory_holds(capability, number, found):
    capability(number)
    assert triton.stages(3, step=40 << 10, fixed=16 << 10) == found
    assert triton.stages(3, step=200 << 10) == 1  # one there must be


def test_every_constant_of_lora_is_tuned():
    tuned = [name for choices in CHOICES.values() for name in choices]
    assert sorted(tuned) == sorted(field.name for field in fields(Tuning))
    for name, choices in ((name, of[name]) for of in CHOICES.values() for name in of):
        assert all(getattr(line, name) in choices for line in lora_triton.TUNING.values())


@pytest.fixture
def runs(monkeypatch):
    """Names of the kernels that were run: what nothing reads, XLA leaves out."""
    names = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    interpret = triton.interpret
    monkeypatch.setattr(triton, "interpret", lambda kernel, *rest: interpret(Noted(kernel), *rest))
    return names


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("half", "kind"), CHOICES)
def test_every_half_runs_as_often_as_is_said(half, kind, runs):
    problem, *_ = problems(kind)
    problem, tuning, size = problem.tiny(), Tuning(whole_programs=1), Size(2, 1)
    call, carry = half_program(problem, problem.data(size), half, tuning, size)
    assert jax.block_until_ready(call(carry)).shape[0] == problem.tokens
    # A step with blocks has a list of single tokens, too.
    kernels = {f"{half}_single", f"{half}_{kind}"}
    if half == "both":
        kernels = {"delta_single"}
        kernels |= {"shrink_block", "expand_block"} if kind == "block" else set()
    assert Counter(runs) == dict.fromkeys(kernels, 2)


ROWS, *_ = problems("single")  # 64 tokens of 64 adapters of rank 16: q, k and v, of 4096 columns
PROMPTS, *_ = problems("block")  # 8 of 512 tokens of such adapters


def of_first_work(problem, operation, tuning):
    """What `shrink` or `delta` gives of a step's first list of work; its shape only."""

    def call():
        pool, adapters, x, y = problem.data(Size(1, 1))
        where = pool, jnp.int32(0), adapters.work[0], adapters.pages
        static = {"modules": problem.modules, "layout": problem.layout, "tuning": tuning}
        given = (x,) if operation == lora_triton.shrink else (x, y)
        return operation(*given, *where, max_rank=max(problem.ranks), **static)

    return jax.eval_shape(call).shape


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (ROWS, 4),
        (PROMPTS, 2),  # of 64 blocks there are then 128 programs
        (replace(PROMPTS, ranks=(16,)), 4),
        (replace(PROMPTS, ranks=(16,) * 64, each=8), 4),  # as many: blocks of its runs are few
        (replace(PROMPTS, ranks=(16,) * 16), 1),
        (replace(PROMPTS, ranks=(64,) * 8), 1),  # three products of 64 ranks each
        (replace(PROMPTS, ranks=(128,), projection="o"), 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_parts_of_x_by_how_few_programs_there_are(problem, parts):
    found = of_first_work(problem, lora_triton.shrink, Tuning())
    assert found == (problem.tokens, problem.modules.count, parts, max(problem.ranks))


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("problem", "constants", "kernels"),
    [
        (ROWS, {"whole_programs": 192, "whole_columns": 4096, "whole_ranks": 16}, ["delta_single"]),
        (ROWS, {"whole_programs": 193}, ["shrink_single", "expand_single"]),
        (ROWS, {"whole_columns": 4095}, ["shrink_single", "expand_single"]),
        (ROWS, {"whole_ranks": 15}, ["shrink_single", "expand_single"]),
        (PROMPTS, {}, ["shrink_block", "expand_block"]),
    ],
    ids=["all that it takes", "programs", "columns", "ranks", "blocks"],
)
def test_both_halves_in_one_where_they_fill_a_card(problem, constants, kernels, monkeypatch):
    launched, launch = [], lora_triton.launch

    def noted(kernel, *args, **options):
        launched.append(kernel.fn.__name__)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(lora_triton, "launch", noted)
    shape = of_first_work(problem, lora_triton.delta, replace(Tuning(), **constants))
    assert shape == (problem.tokens, sum(problem.modules.outputs))
    assert launched == kernels


def test_powers_of_two():
    assert [triton.power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_what_is_wrong_with_the_versions_is_said(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA A10", compute_capability="8.6")
    monkeypatch.setattr("jax.devices", lambda: [gpu])

    def broken():
        raise ImportError("no such symbol")

    monkeypatch.setattr(triton, "jax_triton", broken)
    reason = why_not_triton(dtype="bfloat16", layout=PageLayout(8, 128, 16))
    assert reason is not None
    assert "jax-triton cannot be imported (no such symbol)" in reason
    assert "triton 3.6 and 3.7" in reason


def test_a_triton_without_what_jax_triton_wants_of_it_gets_it(monkeypatch):
    driver = importlib.import_module("triton.backends.nvidia.driver")
    monkeypatch.delattr(driver, "TMA_TF32", raising=False)
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_lib=SimpleNamespace()))
    monkeypatch.setattr(triton, "_take_live_inputs", lambda library: None)
    triton.jax_triton()
    assert driver.TMA_TF32 == 0


@pytest.mark.parametrize("version", [(0, 11, 2), (0, 12, 0)], ids=str)
def test_the_rule_of_dead_code_is_asked_as_it_expects(monkeypatch, version):
    """As JAX of either version asks; adapted once, however often that is done."""
    library = SimpleNamespace(
        triton_kernel_call_p="call",
        pe=SimpleNamespace(dce_rules={"call": lambda used, equation: (used, equation)}),
    )
    monkeypatch.setattr("jax.__version_info__", version)
    for _ in range(2):
        triton._take_live_inputs(library)
    rule = library.pe.dce_rules["call"]
    asked = ("used", "live", "equation") if version >= (0, 12) else ("used", "equation")
    assert rule(*asked) == ("used", "equation")
