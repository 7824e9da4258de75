# SPDX-License-Identifier: Apache-2.0
"""Runs together, the median and the spread of them, the newest commit's only."""

from xml.etree import ElementTree

from benchmarks import report_traces as traces
from benchmarks.report import comparison, report

TRACE = {
    "device": "NVIDIA H200",
    "jax": "0.11.2",
    "commit": "new",
    "date": "2026-01-02",
    "benchmark": "trace",
    "setting": "S1",
    "rate": 60.0,
    "duration": 60.0,
    "popularity": "power",
    "alpha": 1.0,
    "cv": 1.0,
    "lengths": "uniform",
    "batch": 256,
    "step_tokens": 512,
    "adapters": 1000,
    "run": 0,
    "out_tok_s": 7000.0,
    "out_tok_s_steady": 8000.0,
    "req_s": 25.0,
    "req_s_steady": 30.5,
    "ratio": 0.71,
    "ttft_mean_s": 12.345,
    "attainment": 0.25,
    "itl_p50_ms": 24.4,
    "itl_p99_ms": 44.4,
    "loads": 700,
}
OTHER = {**TRACE, "ratio": None, "loads": None, "out_tok_s_steady": None}
LINES = [
    {**TRACE, "commit": "old", "date": "2026-01-01", "out_tok_s_steady": 1.0, "run": 3},
    TRACE,
    {**TRACE, "run": 1, "out_tok_s_steady": 8200.0},
    {**TRACE, "run": 2, "out_tok_s_steady": None, "out_tok_s": 7900.0},
    {**TRACE, "adapters": 5, "popularity": "zipf", "cv": 4.0, "lengths": "arena"},
    {**OTHER, "benchmark": "vllm_lora", "vllm": "0.26.0", "slots": 256, "out_tok_s": 2800.0},
    {**OTHER, "benchmark": "hf_peft", "peft": "0.19.0", "out_tok_s": 70.0, "duration": 30.0},
]


def test_traces():
    text = traces.summary(LINES)
    assert (
        "| S1, 60 requests/s | 1000 | slora-jax | 7000 (7000 to 7900) | 8100 | 25.0 | 71% | 12.35 "
        "| 25% | 24 / 44 | 700 |"
    ) in text
    assert (
        "| S1, 60 requests/s | 1000 | vLLM 0.26.0 | 2800 |  | 25.0 |  | 12.35 | 25% | 24 / 44 |  |"
    ) in text
    assert "| S1, 60 requests/s | 1000 | PEFT 0.19.0 | 70 |" in text
    assert "| S1, 60 requests/s, zipf 1, cv 4, Arena's lengths | 5 | slora-jax | 7000 |" in text
    assert text in report(LINES)


def test_systems_side_by_side():
    # The whole run's figures; of the traces that another system has served, too.
    text = traces.comparison(LINES)
    assert "| vLLM 0.26.0 | slora-jax ÷ vLLM | PEFT 0.19.0 | slora-jax ÷ PEFT |" in text
    row = "| S1, 60 requests/s | 1000 | 7000 (7000 to 7900) | 2800 | 2.5 | 70 | 100.0 |"
    assert text.splitlines()[2:] == [row]
    assert text in comparison(LINES)
    assert "docs/traces.svg" in comparison(LINES)
    assert traces.comparison([TRACE]) == comparison([TRACE]) == ""


def test_of_several_ways_to_set_a_system_up_the_best_counts():
    vllm = {**LINES[5], "step_tokens": 8192, "out_tok_s": 3500.0}
    for lines in ([*LINES, vllm], [vllm, *LINES]):
        text = traces.comparison(lines)
        assert "| 1000 | 7000 (7000 to 7900) | 3500 | 2.0 | 70 | 100.0 |" in text
        picture = traces.plot(lines)
        assert ">3500<" in picture
        assert ">2800<" not in picture
        assert "| 2800 |" in traces.summary(lines)  # all of them, where there is room


def test_the_numbers_of_adapters_are_ours_too():
    lines = [{**TRACE, "benchmark": "adapters", "adapters": 0, "running_mean": 255.6}, *LINES[5:]]
    assert [line.split("|")[2:5] for line in traces.comparison(lines).splitlines()[2:]] == [
        [" none ", " 7000 ", "  "],
        [" 1000 ", "  ", " 2800 "],
    ]


def test_numbers_of_adapters():
    line = {**TRACE, "benchmark": "adapters", "running_mean": 255.6}
    base = {**line, "adapters": 0, "of_base": 1.0, "of_fewest": 1.0, "out_tok_s_steady": 9000.0}
    text = traces.summary([base, {**line, "of_base": 0.889, "of_fewest": 0.951}])
    assert "| S1 | 0 | 9000 | 1.00 |  | 71% | 256 |" in text
    assert "| S1 | 1000 | 8000 | 0.89 | 0.95 | 71% | 256 |" in text


def test_ablations_beside_the_whole():
    line = {**TRACE, "benchmark": "ablations", "pages": 4096, "running_mean": 100.0}
    unified = {**line, "variation": "unified"}
    split = {**line, "variation": "split 30 %", "out_tok_s_steady": 6000.0}
    text = traces.summary([unified, split])
    assert (
        "| S1, 1000 adapters, 4096 pages | split 30 % | 6000 | 0.75 | 12.35 | 25% | 100 |" in text
    )


def test_prefill():
    line = {
        **TRACE,
        "benchmark": "prefill",
        "shape": "llama-2-7b",
        "prompt": 4096,
        "adapters": 1,
        "rank": 16,
        "us": 100_000.0,
        "tokens_per_s": 40950.0,
        "ratio": 0.62,
    }
    row = "| llama-2-7b, 4096 tokens a step | 1 of rank 16 | 100.0 | 40950 | 62 % |"
    assert row in traces.summary([line])


def test_plot_is_a_bar_each_and_the_longest_is_the_most():
    root = ElementTree.fromstring(traces.plot(LINES))
    bars = [one for one in root if one.tag.endswith("rect")][1:]
    assert len(bars) == 4
    widths = sorted(int(one.attrib["width"]) for one in bars)
    assert widths[-1] == 420
    assert widths[0] == round(420 * 70 / 7000)


def test_nothing_without_results():
    assert traces.summary([]) == traces.comparison([]) == ""
