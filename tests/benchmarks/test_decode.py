# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole steps: its arithmetic, and that it runs on a CPU."""

import json

import pytest

from benchmarks import decode
from benchmarks.engine_load import Load, step_tokens
from benchmarks.shapes import LLAMA_2_7B

ARGUMENTS = "--shape tiny --batch 2 --rank 8 --prompt 20 --output 6"


def test_rows(capsys):
    argv = [*ARGUMENTS.split(), "--adapters", "0,resident,2"]
    assert decode.main(argv) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line["benchmark"] == "decode"]
    assert [(row["adapters"], row["resident"]) for row in rows] == [(0, 0), (0, 2), (2, 2)]
    for row in rows:
        assert row["step_ms"] == pytest.approx(row["us"] / 1e3, abs=1e-3)
        assert row["start_s"] > 0
        assert row["ttft_ms"] > 0
    assert rows[2]["bytes"] - rows[1]["bytes"] == 2 * 4 * 2 * 8 * (384 + 256 + 256 + 384)


@pytest.mark.parametrize("text", ["resident", "0,resident", "1,all", "-1"])
def test_rows_that_make_no_sense_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        decode.main([*ARGUMENTS.split(), f"--adapters={text}"])
    assert "--adapters" in capsys.readouterr().err


def test_work_of_a_step():
    load = Load(batch=64, prompt=256, output=128, adapters=64, rank=16)
    base, rest = decode.step_work(LLAMA_2_7B, load, context=320.0, item=2)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert base.bytes == 2 * parameters
    assert base.flops == 2 * 64 * parameters
    kv, adapter = 2 * 32 * 4096 * 320, 32 * 4 * 16 * (4096 + 4096)
    assert rest.bytes == 2 * 64 * (kv + adapter)


def test_steps_with_prompts_are_of_one_size():
    assert step_tokens(batch=64, prompt=256) == 520
    assert step_tokens(batch=1, prompt=16) == 16
