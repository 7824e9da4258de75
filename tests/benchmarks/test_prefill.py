# SPDX-License-Identifier: Apache-2.0
"""What a prompt cannot avoid, by hand, and the benchmark on a CPU."""

import json

import pytest

from benchmarks import prefill
from benchmarks.shapes import TINY


def test_work_by_hand():
    layer = 128 * (256 + 128 + 128) + 256 * 128 + 3 * 128 * 256
    lora = 8 * ((128 + 256) + 2 * (128 + 128) + (256 + 128))
    base = prefill.prompt_work(TINY, 10, 0, 2)
    pairs = 55  # of queries and keys, causally
    assert base.flops == 2 * 10 * 2 * layer + 2 * 128 * 256 + 2 * 4 * 4 * 64 * pairs
    assert base.bytes == 2 * (2 * layer + 128 * 256)
    adapted = prefill.prompt_work(TINY, 10, 8, 2)
    assert adapted.flops - base.flops == 2 * 10 * 2 * lora
    assert adapted.bytes - base.bytes == 2 * 2 * lora


@pytest.mark.long
def test_rows(capfd, tmp_path):
    file = tmp_path / "results.jsonl"
    arguments = "--shape tiny --prompt 32 --adapters 0,2 --rank 8 --requests 4"
    assert prefill.main([*arguments.split(), "--results", str(file)]) == 0
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [json.loads(text) for text in capfd.readouterr().out.splitlines()] == lines
    base, adapted = [line for line in lines if line["benchmark"] == "prefill"]
    assert (base["adapters"], adapted["adapters"]) == (0, 2)
    for line in (base, adapted):
        assert line["tokens_per_s"] == pytest.approx(31e6 / line["us"], rel=1e-3)
        assert line["ratio"] == pytest.approx(line["limit_us"] / line["us"], abs=2e-3)
