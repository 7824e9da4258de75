# SPDX-License-Identifier: Apache-2.0
"""The benchmark of HTTP runs on a CPU, and every token of both ways is in its figures."""

import json

import pytest

from benchmarks import serving
from benchmarks.report import report

# Streams long enough to come in several pieces on a busy machine.
ARGUMENTS = "--shape tiny --batch 2 --streams 2 --prompt 8 --output 960 --adapters 2 --rank 8"


def test_served_takes_times_between_a_requests_own_tokens():
    one = serving.served(10.0, [[11.0, 12.0, 14.0], [11.5, 13.5, 15.5]], tokens=3)
    assert one.per_token == [1.5, 2.0]
    assert one.first_token == [1.0, 1.5]
    assert one.gaps == [1.0, 2.0, 2.0, 2.0]
    assert one.whole == 5.5


@pytest.mark.long
def test_both_ways(capfd, tmp_path):
    file = tmp_path / "results.jsonl"
    assert serving.main([*ARGUMENTS.split(), "--results", str(file)]) == 0
    [line] = [json.loads(text) for text in file.read_text().splitlines()]
    assert json.loads(capfd.readouterr().out) == line
    for name in ("step_ms", "gap_p99_ms", "ttft_ms", "tokens_per_s"):
        assert line[name] > 0
        assert line[f"{name}_offline"] > 0
    assert line["ratio"] == pytest.approx(line["limit_us"] / line["us"], abs=2e-3)
    requests = "tiny, 2 at a time, 2 requests of 8 + 960, 2 of rank 8"
    assert f"| {requests} | without HTTP |" in report([line])


def test_streams_that_came_in_one_piece_have_no_time_per_token():
    with pytest.raises(RuntimeError, match="--output"):
        serving.check_pieces(serving.served(0.0, [[1.0], [1.0, 2.0]], tokens=8))
    serving.check_pieces(serving.served(0.0, [[1.0, 1.5], [1.0, 2.0]], tokens=8))
