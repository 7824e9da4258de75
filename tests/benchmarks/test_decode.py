# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole steps: its arithmetic, and that it runs on a CPU."""

import json

import pytest

from benchmarks import decode
from benchmarks.engine_load import Load, step_tokens
from benchmarks.shapes import LLAMA_2_7B

ARGUMENTS = "--shape tiny --batch 2 --rank 8 --prompt 20 --output 6"


@pytest.mark.long
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


@pytest.mark.long
def test_mixed_ranks_on_all_linear_layers(capsys):
    argv = [*ARGUMENTS.replace("--rank 8", "--rank 16,8").split(), "--modules", "all-linear"]
    assert decode.main([*argv, "--adapters", "2", "--output", "20"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["rank"], row["modules"], row["resident"]) == ("16,8", "all-linear", 2)


@pytest.mark.parametrize("text", ["resident", "0,resident", "1,all", "-1"])
def test_rows_that_make_no_sense_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        decode.main([*ARGUMENTS.split(), f"--adapters={text}"])
    assert "--adapters" in capsys.readouterr().err


def test_work_of_a_step():
    load = Load(batch=64, prompt=256, output=128, adapters=64, ranks=(16,))
    base, rest = decode.step_work(LLAMA_2_7B, load, context=320.0, item=2)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert base.bytes == 2 * parameters
    assert base.flops == 2 * 64 * parameters
    kv, adapter = 2 * 32 * 4096 * 320, 32 * 4 * 16 * (4096 + 4096)
    assert rest.bytes == 2 * 64 * (kv + adapter)
    few = Load(64, 256, 128, adapters=3, ranks=(16, 8), modules=("gate_proj",))
    _, rest_of_few = decode.step_work(LLAMA_2_7B, few, context=320.0, item=2)
    of_rank = 32 * (4096 + 11008)
    assert rest_of_few.bytes == 2 * (64 * kv + (16 + 8 + 16) * of_rank)
    # Of 64 requests, 22 have the first adapter and 21 each of the others.
    attention = rest.flops - 2 * 64 * adapter
    assert rest_of_few.flops == attention + 2 * ((22 + 21) * 16 + 21 * 8) * of_rank


def test_steps_with_prompts_are_of_one_size():
    assert step_tokens(batch=64, prompt=256, output=128) == 520
    assert step_tokens(batch=1, prompt=16, output=4) == 16


@pytest.mark.parametrize("batch", [1, 64, 256])
def test_the_first_request_still_decodes_when_the_last_ones_prompt_is_done(batch):
    prompt, output = 256, 128
    computed = steps = 0
    while computed < batch * prompt:
        computed += step_tokens(batch, prompt, output) - computed // prompt
        steps += 1
    assert steps < output / 2
