# SPDX-License-Identifier: Apache-2.0
"""How constants are searched, and what is said where there is nothing to tune."""

from dataclasses import dataclass

import pytest

from benchmarks import tune_lora
from benchmarks.projection_problems import DECODE_TOKENS
from benchmarks.tune_lora import CHOICES, descend


@dataclass(frozen=True)
class Two:
    a: int = 1
    b: int = 1


def test_the_cheapest_that_one_change_after_the_other_finds():
    asked = []

    def cost(two):
        asked.append(two)
        return 2 * abs(two.a - 4) + abs(two.b - two.a)  # b alone would stay at 1

    choices = {"b": (1, 2, 4), "a": (1, 2, 4)}
    assert descend(Two(), choices, cost) == (Two(4, 4), 0)
    assert len(asked) == len(set(asked))


def test_what_cannot_be_is_not_chosen():
    assert descend(Two(), {"a": (2, 3)}, lambda two: {1: 5.0, 2: float("inf"), 3: 4.0}[two.a]) == (
        Two(a=3),
        4.0,
    )


def test_what_gains_too_little_is_noise():
    costs = {1: 5.0, 2: 4.96, 3: 4.94}
    assert descend(Two(), {"a": (1, 2)}, lambda two: costs[two.a]) == (Two(), 5.0)
    assert descend(Two(), {"a": (1, 2, 3)}, lambda two: costs[two.a]) == (Two(a=3), 4.94)


def test_a_card_that_is_full_is_no_result(monkeypatch, capsys):
    pytest.importorskip("jax_triton")

    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tune_lora, "why_not", lambda backend: None)
    monkeypatch.setattr(tune_lora, "half_us", full)
    tiny = [problem.tiny() for problem in tune_lora.problems("single")]
    monkeypatch.setattr(tune_lora, "problems", lambda kind: tiny)
    monkeypatch.setattr("pallas_kernels.triton.INTERPRETED", True)
    with pytest.raises(SystemExit):
        tune_lora.main([])
    said = capsys.readouterr()
    assert "shrink of singles cannot be measured" in said.err
    assert "out of memory" in said.out
    assert "Tuning(" not in said.out


def test_every_half_has_problems_of_its_own():
    single, block = tune_lora.problems("single"), tune_lora.problems("block")
    assert {kind for _, kind in CHOICES} == {"single", "block"}
    assert len({*single, *block}) == len(single) + len(block) == 8
    assert max(one.tokens for one in single) <= DECODE_TOKENS < min(one.tokens for one in block)


def test_without_a_gpu_the_reason_is_said(capsys):
    with pytest.raises(SystemExit):
        tune_lora.main([])
    assert "cannot run here" in capsys.readouterr().err
