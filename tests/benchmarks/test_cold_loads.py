# SPDX-License-Identifier: Apache-2.0
"""The benchmark of adapters that come and go runs on a CPU, and what it calls cold is cold."""

import json

import pytest

from benchmarks import cold_loads

ARGUMENTS = """--shape tiny --batch 4 --prompt 16 --steps 45 --arrival-prompt 4 --pages 140
    --host-gib 1 --threads 2 --fit 6 --requests 16 --curve-prompt 16 --curve-output 4"""


@pytest.mark.long
def test_loads_and_curve(capsys):
    assert cold_loads.main(ARGUMENTS.split()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loads = [line for line in lines if line["benchmark"] == "cold_load"]
    assert [line["arrivals_are"] for line in loads] == ["none", "warm", "cold"] * 2
    assert [line["modules"] for line in loads] == [4] * 3 + [7] * 3
    for line in loads:
        assert line["steps"] == 45
        assert 0 < line["step_ms"] <= line["step_p99_ms"]
        assert ("ttft_ms" in line) == (line["arrivals_are"] != "none")
    curve = [line for line in lines if line["benchmark"] == "adapters_curve"]
    assert [line["adapters"] for line in curve] == [3, 6, 12, 24]
    assert curve[-1]["loads"] > curve[0]["loads"]
    assert all(line["tokens_per_s"] > 0 for line in curve)
