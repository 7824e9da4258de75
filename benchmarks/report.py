# SPDX-License-Identifier: Apache-2.0
"""Writes what `benchmarks/results/*.jsonl` say into the README and `docs/`, and pictures of it.

python -m benchmarks.report

The README has the comparison with other servers, `docs/benchmarks.md` has everything. Of results of
the same thing on the same device, the latest counts.
"""

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

from benchmarks import report_tensor_parallel as tensor_parallel
from benchmarks import report_traces as traces
from benchmarks import targets
from benchmarks.tables import table
from pallas_kernels.backend import Backend

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
DEVICES_PAGE = DOCS / "tensor_parallel.md"
PLOT, CURVE, DEVICES, TRACES = (
    f"{name}.svg" for name in ("benchmarks", "adapters", "tensor_parallel", "traces")
)
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"

type Line = dict[str, Any]

# What makes two lines results of the same thing, and so one replace the other.
_IDENTITY = (
    "device", "benchmark", "case", "model", "backend",
    "shape", "dtype", "batch", "prompt", "output", "adapters", "rank", "modules",
    "adapters_of", "arrivals_are", "fit", "streams",
    "setting", "rate", "duration", "popularity", "alpha", "cv", "lengths",
    "variation", "pages", "run", "step_tokens", "slots",
    "devices", "processes", "partition", "silent", "context", "beside",
)  # fmt: skip

_BEFORE = {"modules": "attention"}  # what lines mean that were written before the field was


def read_results(directory: Path = RESULTS) -> list[Line]:
    """The latest result of everything, in the order in which things were first measured."""
    files = sorted(directory.glob("*.jsonl"))
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines() if text]
    latest: dict[tuple, Line] = {}
    for line in sorted(lines, key=lambda line: line["date"]):
        values = (line.get(name, _BEFORE.get(name)) for name in _IDENTITY)
        key = (*values, bool(line.get("resident")))
        latest[key] = line
    return list(latest.values())


def comparison(lines: Sequence[Line]) -> str:
    """What the README says: ours and other servers, and a step; empty without results."""
    parts = []
    for own in by_device(lines):
        if compared := traces.comparison(own):
            of = [
                line for line in own if line["benchmark"] in (*traces.SYSTEMS, "decode", "ceiling")
            ]
            parts += [
                _heading(of),
                compared,
                f"![Output tokens a second](docs/{TRACES})",
                steps([line for line in of if line.get("backend") in (None, best_backend(of))]),
            ]
    return "\n\n".join(part for part in parts if part)


def report(lines: Sequence[Line]) -> str:
    """What the page on benchmarks says; empty without results."""
    parts = [targets.summary(lines)]
    for own in by_device(lines):
        parts += [f"## {own[0]['device']}", _heading(own), steps(own), traces.summary(own)]
        parts += [_kernels(own), _loads(own), _curve(own), _serving(own)]
        parts += [tensor_parallel.summary(own)]
    if any(map(_is_plotted, lines)):
        parts += [
            "## Pictures",
            f"![Time at the limit over time measured, of every kernel]({PLOT})",
        ]
    if any(line["benchmark"] == "adapters_curve" for line in lines):
        parts.append(f"![Tokens a second and time to the first token, by adapters]({CURVE})")
    return "\n\n".join(part for part in parts if part)


def by_device(lines: Sequence[Line]) -> list[list[Line]]:
    """The results of each device."""
    devices = dict.fromkeys(line["device"] for line in lines)
    return [[line for line in lines if line["device"] == device] for device in devices]


def best_backend(lines: Sequence[Line]) -> str | None:
    """The fastest that has results: what a user of such a device gets."""
    found = {line["backend"] for line in lines if line.get("backend")}
    return next((name for name in get_args(Backend) if name in found), None)


def _heading(lines: Sequence[Line]) -> str:
    """Where it was measured, and what the device can do at best."""
    device = lines[0]["device"]
    best = {
        line["case"]: line
        for line in lines
        if line["benchmark"] == "ceiling" and not line.get("beside")
    }
    jax_versions = ", ".join(sorted({line["jax"] for line in lines}))
    commits = ", ".join(dict.fromkeys(f"`{line['commit']}`" for line in lines))
    text = f"Measured on one {device} with JAX {jax_versions}, at {commits}."
    if len(best) == 3:
        rate = {name: 1e-6 * line["bytes"] / line["us"] for name, line in best.items()}
        flops = 1e-6 * best["matmul"]["flops"] / best["matmul"]["us"]
        text += (
            f" The limit is what the least traffic and arithmetic take at the best that was "
            f"measured in the same run: {max(rate['copy'], rate['read']):.2f} TB/s and "
            f"{flops:.0f} TFLOP/s."
        )
    return text


def steps(lines: Sequence[Line]) -> str:
    """Decode steps, against their limit."""
    found = [line for line in lines if line["benchmark"] == "decode"]
    rows = [
        [
            line["shape"],
            f"{line['batch']}, {line['prompt']} + {line['output']}",
            _adapters(line),
            line["backend"],
            f"{line['step_ms']:.2f}",
            f"{line['limit_ms']:.2f}",
            _percent(line),
            f"{line['tokens_per_s']:.0f}",
        ]
        for line in sorted(found, key=lambda line: line["batch"])
    ]
    heads = (
        "Decode step", "requests, tokens", "adapters", "kernels", "ms", "limit", "of limit",
        "tokens/s",
    )  # fmt: skip
    return table(heads, rows)


def _adapters(line: Line) -> str:
    if line["adapters"]:
        of = ", all-linear" if line.get("modules") == "all-linear" else ""
        return f"{line['adapters']} of rank {line['rank']}{of}"
    return f"none used, {line['resident']} resident" if line["resident"] else "none"


def _kernels(lines: Sequence[Line]) -> str:
    """The rows of the target table: each operation's kernel, with Triton's and XLA beside it."""
    others = {
        name: {_case(line): line for line in lines if line.get("backend") == name}
        for name in ("triton", "xla")
    }
    rows = []
    for line in lines:
        if line.get("target") and line["backend"] == "mosaic":
            triton, reference = (found.get(_case(line)) for found in others.values())
            rows.append(
                [
                    f"`{line['benchmark']}`",
                    line["case"],
                    f"{line['us']:.1f}",
                    f"{line['limit_us']:.1f}",
                    _percent(line),
                    _beside(line, triton, "us"),
                    _beside(line, triton, "device_us"),
                    f"{reference['us']:.1f}" if reference else "",
                    f"{100 * line['of_base']:.0f} %" if "of_base" in line else "",
                ]
            )
    heads = (
        "Kernel", "", "µs", "limit", "of limit", "Triton, µs (÷ Mosaic)",
        "on the device alone", "XLA, µs", "of the base's matmul",
    )  # fmt: skip
    return table(heads, rows)


def _beside(line: Line, other: Line | None, field: str) -> str:
    """Another backend's time, and how much longer it is."""
    if other is None or not (line.get(field) and other.get(field)):
        return ""
    return f"{other[field]:.1f} ({other[field] / line[field]:.2f})"


def _loads(lines: Sequence[Line]) -> str:
    """Decode steps beside which short requests come, for adapters in the pool or not."""
    rows = [
        [
            f"rank {line['rank']}, {line['modules']} modules, "
            f"{line['adapter_bytes'] / 2**20:.0f} MiB",
            {"none": "nobody", "warm": "in the pool", "cold": "in host memory"}[
                line["arrivals_are"]
            ],
            f"{line['step_ms']:.2f}",
            f"{line['step_p99_ms']:.2f}",
            f"{line['step_of_none']:.3f}",
            f"{line['step_of_warm']:.3f}",
            f"{line['ttft_ms']:.1f}" if "ttft_ms" in line else "",
            f"{line['copy_ms']:.2f}" if line["arrivals_are"] == "cold" else "",
        ]
        for line in lines
        if line["benchmark"] == "cold_load"
    ]
    heads = (
        "Adapters of those who come",
        "are",
        "step, ms",
        "p99",
        "of nobody's",
        "of in the pool's",
        "first token, ms",
        "copy, ms",
    )
    return table(heads, rows)


def _curve(lines: Sequence[Line]) -> str:
    """More adapters than the pool holds."""
    rows = [
        [
            f"{line['adapters']}, {line['fit']} fit",
            f"{line['loads']} of {line['requests']}",
            f"{line['tokens_per_s']:.0f}",
            f"{line['step_ms']:.2f}",
            f"{line['ttft_ms']:.0f}",
            f"{line['ttft_p99_ms']:.0f}",
        ]
        for line in lines
        if line["benchmark"] == "adapters_curve"
    ]
    heads = ("Adapters", "loads, of requests", "tokens/s", "step, ms", "first token, ms", "p99")
    return table(heads, rows)


def _serving(lines: Sequence[Line]) -> str:
    """The same requests without HTTP, and as open streams of it."""
    rows = [
        [
            f"{line['shape']}, {line['batch']} at a time, {line['streams']} requests of "
            f"{line['prompt']} + {line['output']}, {_adapters(line)}",
            how,
            f"{line[f'step_ms{key}']:.2f}",
            f"{line[f'gap_p99_ms{key}']:.1f}",
            f"{line[f'ttft_ms{key}']:.0f}",
            f"{line[f'tokens_per_s{key}']:.0f}",
        ]
        for line in lines
        if line["benchmark"] == "serving"
        for how, key in (("without HTTP", "_offline"), ("streams over HTTP", ""))
    ]
    heads = ("Serving", "", "per token, ms", "p99", "first token, ms", "tokens/s")
    return table(heads, rows)


def _case(line: Line) -> tuple:
    return line["benchmark"], line.get("case"), line.get("model")


def _percent(line: Line) -> str:
    return f"{100 * line['ratio']:.0f} %"


def _is_plotted(line: Line) -> bool:
    return bool(line.get("case") and line.get("backend") == "mosaic")


def plot(lines: Sequence[Line]) -> str:
    """A bar for every kernel, as long as its share of what the device can do."""
    bars = [line for line in lines if _is_plotted(line)]
    devices = list(dict.fromkeys(line["device"] for line in bars))
    row, left, width = 20, 430, 400
    height = row * (len(bars) + len(devices) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x = left + width * percent // 100
        parts += [
            f'<line x1="{x}" x2="{x}" y1="{row}" y2="{height}" stroke="#ccc"/>',
            f'<text x="{x}" y="14" text-anchor="middle" fill="#666">{percent} %</text>',
        ]
    y = row
    for device in devices:
        parts.append(f'<text x="6" y="{y + 14}" font-weight="bold">{escape(device)}</text>')
        y += row
        for line in (line for line in bars if line["device"] == device):
            length = round(width * min(line["ratio"], 1.1))
            label = escape(f"{line['benchmark']}: {line['case']}")
            parts += [
                f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{label}</text>',
                f'<rect x="{left}" y="{y + 3}" width="{length}" height="14" fill="#4878a8">'
                f"<title>{line['us']} µs</title></rect>",
            ]
            y += row
    return "\n".join([*parts, "</svg>\n"])


def plot_curve(lines: Sequence[Line]) -> str:
    """Throughput and time to the first token against the number of adapters, relative to fewest."""
    curve = [line for line in lines if line["benchmark"] == "adapters_curve"]
    curve = sorted(
        (line for line in curve if line["device"] == curve[-1]["device"]),
        key=lambda line: line["adapters"],
    )
    width, height, left, top = 560, 220, 60, 30
    series = {
        "tokens/s": ("#4878a8", [line["tokens_per_s"] for line in curve]),
        "first token, median ms": ("#c05030", [line["ttft_ms"] for line in curve]),
    }
    step = (width - 2 * left) / max(len(curve) - 1, 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, line in enumerate(curve):
        label = f"{line['adapters']} adapters"
        x = left + step * number
        parts.append(
            f'<text x="{x:.0f}" y="{height - 10}" text-anchor="middle" fill="#666">{label}</text>'
        )
    for number, (name, (colour, values)) in enumerate(series.items()):
        most = max(values)
        points = [
            (left + step * i, top + (height - top - 40) * (1 - 0.8 * value / most))
            for i, value in enumerate(values)
        ]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        parts += [
            f'<text x="{left + 240 * number}" y="16" fill="{colour}">{escape(name)}</text>',
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            *(
                f'<text x="{x:.0f}" y="{y - 6:.0f}" text-anchor="middle" fill="{colour}">'
                f"{value:.0f}</text>"
                for (x, y), value in zip(points, values, strict=True)
            ),
        ]
    return "\n".join([*parts, "</svg>\n"])


def updated(page: str, text: str) -> str:
    """A page with something else between its markers."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{text}\n{END}{after}" if text else f"{before}{START}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    lines = read_results()
    for page, text in pages(lines).items():
        page.write_text(updated(page.read_text(), text))
    for name, picture in pictures(lines).items():
        (DOCS / name).write_text(picture)
    return 0


def pages(lines: Sequence[Line]) -> dict[Path, str]:
    """What stands between each page's markers."""
    return {
        README: comparison(lines),
        PAGE: report(lines),
        DEVICES_PAGE: tensor_parallel.full(lines),
    }


def pictures(lines: Sequence[Line]) -> dict[str, str]:
    """The pictures of what there are results of, by file name in `docs`."""
    drawn = (
        (PLOT, plot, _is_plotted),
        (CURVE, plot_curve, lambda line: line["benchmark"] == "adapters_curve"),
        (TRACES, traces.plot, traces.is_plotted),
        (DEVICES, tensor_parallel.plot, tensor_parallel.is_plotted),
    )
    return {name: draw(lines) for name, draw, is_of in drawn if any(map(is_of, lines))}


if __name__ == "__main__":
    raise SystemExit(main())
