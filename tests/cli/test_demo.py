# SPDX-License-Identifier: Apache-2.0
"""`slora demo` is right, says so in JSON, and fails when an adapter's text is not its own."""

import json

import pytest

from slora_jax.cli import demo, main
from slora_jax.demo import adapter_dirs
from slora_jax.demo.tasks import TASKS


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, dict]:
    code = main(["demo", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.long  # `.ci/run` runs the demo as users do
def test_every_adapter_is_right(capsys):
    code, report = run(capsys)
    assert code == 0
    assert set(report["adapters"]) == set(TASKS)
    assert min(adapter["accuracy"] for adapter in report["adapters"].values()) >= 0.95
    ranks = {name: adapter["rank"] for name, adapter in report["adapters"].items()}
    assert (ranks["upper"], ranks["no_vowels"], ranks["reverse_words"]) == (4, 12, 64)
    pool = report["pool"]
    assert set(pool["adapters"]) <= set(TASKS)
    assert pool["kv"] + sum(pool["adapters"].values()) + pool["free"] == pool["pages"]


@pytest.mark.long
def test_an_adapter_that_answers_for_another_fails(capsys, monkeypatch):
    swapped = adapter_dirs()
    swapped["upper"], swapped["rot13"] = swapped["rot13"], swapped["upper"]
    monkeypatch.setattr(demo, "adapter_dirs", lambda: swapped)
    code, report = run(capsys, "--held-out", "1")
    assert code == 1
    assert report["adapters"]["upper"]["accuracy"] == 0
    assert report["adapters"]["leet"]["accuracy"] == 1
