# SPDX-License-Identifier: Apache-2.0
"""Traces have the rates, lengths and adapters that were asked for."""

from collections import Counter

import numpy as np
import pytest

from slora_jax.simulator.workloads import (
    TraceError,
    Workload,
    fitted_to,
    read_trace,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
2023-11-16 18:15:52.2225670,91,16
"""
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
119,GPT-4,118,276,394,API log
121,GPT-4,119,277,396,API log
"""


def test_the_default_trace():
    trace = Workload(adapters=200, rate=6, seconds=300).arrivals(0)
    assert len(trace) == 1800
    times = [one.time for one in trace]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(300, rel=0.1)
    for lengths in ([one.prompt for one in trace], [one.output for one in trace]):
        assert min(lengths) >= 8
        assert max(lengths) < 512
        assert np.mean(lengths) == pytest.approx(259.5, rel=0.05)
    assert trace == Workload(adapters=200, rate=6, seconds=300).arrivals(0)
    assert trace != Workload(adapters=200, rate=6, seconds=300).arrivals(1)


@pytest.mark.parametrize("cv", [0.5, 1, 4])
def test_burstiness(cv):
    trace = Workload(adapters=1, rate=10, seconds=5000, cv=cv).arrivals(0)
    gaps = np.diff([one.time for one in trace])
    assert np.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize(("alpha", "top"), [(1.0, 0.013), (0.3, 0.225), (0.1, 0.57)])
def test_alpha_is_the_papers(alpha, top):
    """The hottest of 200 adapters, in traces of 600 requests; alpha 1 is uniform."""
    trace = Workload(adapters=200, rate=2, seconds=30000, alpha=alpha).arrivals(0)
    share = max(Counter(one.adapter for one in trace).values()) / len(trace)
    expected = (1 / 200) ** alpha if alpha < 1 else 1 / 200
    assert share == pytest.approx(expected, rel=0.2)
    assert share == pytest.approx(top, abs=0.03)


def test_zipf():
    trace = Workload(adapters=50, rate=10, seconds=5000, zipf=1.0).arrivals(0)
    counts = Counter(one.adapter for one in trace)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)


def test_without_adapters_all_ask_for_the_base():
    assert {one.adapter for one in Workload(adapters=0, rate=1, seconds=9).arrivals()} == {None}


@pytest.mark.parametrize("name", ["rate", "seconds", "cv", "alpha", "shortest", "longest"])
def test_workloads_are_checked(name):
    with pytest.raises(ValueError, match=name):
        Workload(**{"adapters": 1, "rate": 1, "seconds": 9, name: 0})


def test_azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    trace = read_trace(path)
    assert [(one.prompt, one.output) for one in trace] == [
        (374, 44), (396, 109), (879, 55), (91, 16)
    ]  # fmt: skip
    assert [one.time for one in trace] == pytest.approx([0, 4.314579, 4.541977, 5.541977])


def test_burstgpt_without_the_failures(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(BURST_GPT)
    trace = read_trace(path)
    assert [(one.time, one.prompt, one.output) for one in trace] == [
        (0, 472, 18), (40, 1087, 230), (114, 118, 276), (116, 119, 277)
    ]  # fmt: skip


def test_a_recorded_trace_keeps_its_bursts_at_another_rate(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(BURST_GPT)
    trace = fitted_to(read_trace(path), Workload(adapters=4, rate=0.5, seconds=60))
    assert [one.prompt for one in trace] == [472, 118, 119]  # 1087 is too long
    assert [one.time for one in trace] == pytest.approx([0, 4 * 114 / 116, 4])
    with pytest.raises(TraceError, match="too few"):
        fitted_to(read_trace(path), Workload(adapters=4, rate=0.5, seconds=60, longest=100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column 'Timestamp'"),
        (BURST_GPT.replace("472", "x"), "line 2: 'x' is no number"),
        (AZURE.replace("2023-11-16 18:15:46", "yesterday"), "line 2: 'yesterday.6805900'"),
        ("", "no column"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)
