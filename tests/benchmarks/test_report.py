# SPDX-License-Identifier: Apache-2.0
"""The figures of the README and of the pages in `docs/` are those of the committed results."""

import json
from xml.etree import ElementTree

from benchmarks import report_tensor_parallel as tensor_parallel
from benchmarks.report import (
    DOCS,
    comparison,
    pages,
    pictures,
    plot,
    plot_curve,
    read_results,
    report,
    updated,
)

WHERE = {"device": "NVIDIA H200", "jax": "0.11.2", "commit": "abc", "date": "2026-01-01"}
DECODE = {
    **WHERE,
    "benchmark": "paged_decode",
    "case": "32/8 heads & more",
    "model": "llama-3-8b",
    "target": True,
    "backend": "mosaic",
    "us": 200.0,
    "limit_us": 150.0,
    "ratio": 0.75,
}
STEP = {
    **WHERE,
    "benchmark": "decode",
    "backend": "mosaic",
    "shape": "llama-2-7b",
    "batch": 64,
    "prompt": 256,
    "output": 128,
    "adapters": 64,
    "resident": 64,
    "rank": 16,
    "step_ms": 7.25,
    "limit_ms": 6.0,
    "ratio": 0.83,
    "tokens_per_s": 8827.6,
}


def test_the_pages_say_what_was_measured():
    for page, text in pages(read_results()).items():
        before = page.read_text()
        assert updated(before, text) == before, f"{page.name}: run python -m benchmarks.report"


def test_the_pictures_show_what_was_measured():
    found = pictures(read_results())
    assert {"benchmarks.svg", "traces.svg", "tensor_parallel.svg"} <= set(found)
    for name, picture in found.items():
        assert (DOCS / name).read_text() == picture, f"{name}: run python -m benchmarks.report"


def test_without_results_there_is_no_table(tmp_path):
    assert read_results(tmp_path) == []
    assert report([]) == comparison([]) == ""
    assert pictures([]) == {}


def test_the_latest_result_counts(tmp_path):
    later = {**DECODE, "us": 160.0, "date": "2026-01-02"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(later)}\n{json.dumps(STEP)}\n")
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(DECODE)}\n")
    lines = read_results(tmp_path)
    assert sorted(line["benchmark"] for line in lines) == ["decode", "paged_decode"]
    assert [line["us"] for line in lines if "us" in line] == [160.0]


def test_base_only_rows_with_and_without_residents_are_two(tmp_path):
    rows = [{**STEP, "adapters": 0, "resident": n} for n in (0, 64)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(read_results(tmp_path)) == 2


def test_tables():
    text = report([DECODE, {**DECODE, "backend": "xla", "us": 900.0}, STEP])
    assert "| `paged_decode` | 32/8 heads & more | 200.0 | 150.0 | 75 % |  |  | 900.0 |  |" in text
    step = "| llama-2-7b | 64, 256 + 128 | 64 of rank 16 | mosaic | 7.25 | 6.00 | 83 % | 8828 |"
    assert step in text


def test_backends_side_by_side():
    steps = [STEP, {**STEP, "backend": "triton", "step_ms": 8.5}]
    text = report([DECODE, {**DECODE, "backend": "triton", "us": 210.0}, *steps])
    assert "| 200.0 | 150.0 | 75 % | 210.0 (1.05) |  |  |  |" in text
    assert "| 64 of rank 16 | triton | 8.50 |" in text
    of_device = ({"device_us": 190.0}, {"backend": "triton", "us": 240.0, "device_us": 209.0})
    text = report([{**DECODE, **more} for more in of_device])
    assert "| 240.0 (1.20) | 209.0 (1.10) |" in text
    # Where systems are compared, ours is as it comes.
    trace = {"setting": "S1", "rate": 60.0, "popularity": "power", "alpha": 1.0, "cv": 1.0}
    trace |= {"lengths": "uniform", "duration": 60.0, "adapters": 5, "out_tok_s": 2800.0}
    text = comparison([*steps, {**WHERE, "benchmark": "vllm_lora", "vllm": "0.26.0", **trace}])
    assert "| mosaic | 7.25 |" in text
    assert "triton" not in text


LOAD = {
    **WHERE,
    "benchmark": "cold_load",
    "arrivals_are": "cold",
    "adapters_of": "attention",
    "rank": 16,
    "modules": 4,
    "adapter_bytes": 2**25,
    "copy_ms": 0.65,
    "step_ms": 7.6,
    "step_p99_ms": 8.2,
    "step_of_none": 1.02,
    "step_of_warm": 1.01,
    "ttft_ms": 23.5,
}
CURVES = [
    {
        **WHERE,
        "benchmark": "adapters_curve",
        "adapters": count,
        "fit": 96,
        "loads": 4,
        "requests": 512,
        "tokens_per_s": 5000.0,
        "step_ms": 7.6,
        "ttft_ms": 30.0,
        "ttft_p99_ms": 41.0,
    }
    for count in (48, 96)
]


def test_tables_of_loads():
    text = report([LOAD, *CURVES])
    wanted = (
        "rank 16, 4 modules, 32 MiB | in host memory | 7.60 | 8.20 | 1.020 | 1.010 | 23.5 | 0.65 |"
    )
    assert wanted in text
    assert "| 96, 96 fit | 4 of 512 | 5000 | 7.60 | 30 | 41 |" in text


def test_a_table_of_serving():
    line = {**WHERE, "benchmark": "serving", "shape": "llama-2-7b", "batch": 256, "streams": 500}
    line |= {"prompt": 128, "output": 64, "adapters": 8, "rank": 16}
    line |= {"step_ms": 22.609, "gap_p99_ms": 30.01, "ttft_ms": 2317.5, "tokens_per_s": 8388.4}
    line |= {f"{name}_offline": 10.0 for name in line if name.endswith(("_ms", "_per_s"))}
    what = "llama-2-7b, 256 at a time, 500 requests of 128 + 64, 8 of rank 16"
    text = report([line])
    assert f"| {what} | without HTTP | 10.00 | 10.0 | 10 | 10 |" in text
    assert f"| {what} | streams over HTTP | 22.61 | 30.0 | 2318 | 8388 |" in text


def test_the_curve_is_well_formed():
    picture = ElementTree.fromstring(plot_curve([LOAD, *CURVES]))
    assert sum(e.tag.endswith("polyline") for e in picture) == 2


def test_the_picture_is_well_formed():
    picture = ElementTree.fromstring(plot([DECODE, STEP]))
    bars = [e for e in picture if e.tag.endswith("rect") and len(e)]
    assert [bar.get("width") for bar in bars] == ["300"]


def sharded(devices: int, ms: float, rank: int = 0, **fields) -> dict:
    return {
        **WHERE,
        "benchmark": "tensor_parallel",
        "shape": "llama-2-7b",
        "processes": 1,
        "devices": devices,
        "partition": "no-comm",
        "silent": False,
        "batch": 64,
        "context": 2048,
        "adapters": 64 if rank else 0,
        "rank": rank,
        "step_ms": ms,
        "dispatch_ms": 3.0,
        **fields,
    }


SHARDED = [
    sharded(1, 18.0),
    sharded(2, 10.0),
    sharded(2, 9.0, silent=True),
    sharded(1, 20.0, 16),
    sharded(2, 12.5, 16),
    sharded(2, 11.5, 16, silent=True),
    sharded(2, 14.0, 16, partition="slora"),
    sharded(2, 11.0, 16, processes=2),
]


def test_tables_of_several_devices():
    text = report(SHARDED)
    assert "| 64, 2048 | none | 18.00 | 10.00 | 1.80 | 10 % |  |  | 3.0 |" in text
    assert "| 64, 2048 | 64 of rank 16 | 20.00 | 12.50 | 1.60 | 8 % | 20 % | 14.00 | 3.0 |" in text
    assert "| 64, 2048 | 64 of rank 16 | 11.00 | 3.0 |" in tensor_parallel.full(SHARDED)


def test_the_picture_of_several_devices_is_well_formed():
    picture = ElementTree.fromstring(tensor_parallel.plot(SHARDED))
    widths = [e.get("width") for e in picture if e.get("height") == "12" and e.get("y") != "8"]
    assert widths == ["396", "198", "22", "440", "253", "22"]
