# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's experiments as tables and a picture: traces, baselines, ablations, prefill.

A row is the median of the runs of one commit; beside the main figure stands the whole spread.
Systems are compared by what they gave in the whole run: where latencies are long, a run of a minute
has no steady part. Of several ways in which one was set up, the best counts.
"""

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmarks.tables import table

type Line = dict[str, Any]

OURS = "slora-jax"
SYSTEMS = {"trace": OURS, "adapters": OURS, "vllm_lora": "vLLM", "hf_peft": "PEFT"}
_TRACE = ("setting", "rate", "popularity", "alpha", "cv", "lengths")
_WORKLOAD = (*_TRACE, "duration", "adapters")
_SETUP = ("batch", "step_tokens", "slots")
_COLOURS = {"slora-jax": "#4878a8", "vLLM": "#c05030", "PEFT": "#888888"}


class Row:
    """The runs of one thing.

    Args:
        lines: of the results, at least one.
    """

    def __init__(self, lines: Sequence[Line]):
        newest = max(lines, key=lambda line: line["date"])["commit"]
        self.runs = [line for line in lines if line["commit"] == newest]
        self.first = self.runs[0]

    def values(self, *names: str) -> list[float]:
        """Of every run, under the first name that it has a value for."""
        found = (
            next((line[n] for n in names if line.get(n) is not None), None) for line in self.runs
        )
        return [value for value in found if value is not None]

    def median(self, *names: str) -> float | None:
        values = self.values(*names)
        return statistics.median(values) if values else None

    def text(self, form: str, *names: str) -> str:
        value = self.median(*names)
        return "" if value is None else format(value, form)

    def spread(self, form: str, *names: str) -> str:
        """The median, and least and most of several runs."""
        values = self.values(*names)
        if len(values) < 2:
            return self.text(form, *names)
        return f"{self.text(form, *names)} ({min(values):{form}} to {max(values):{form}})"


def rows(lines: Iterable[Line], benchmarks: Sequence[str], *, by: Sequence[str] = ()) -> list[Row]:
    """The results of some benchmarks, runs together."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        if line["benchmark"] in benchmarks:
            key = line["benchmark"], *(line.get(name) for name in (*_WORKLOAD, *by))
            groups.setdefault(key, []).append(line)
    return [Row(group) for group in groups.values()]


def best(lines: Iterable[Line]) -> list[Row]:
    """The systems' traces, each as the system is set up best for it."""
    found: dict[tuple, Row] = {}
    for row in rows(lines, tuple(SYSTEMS), by=_SETUP):
        key = row.first["benchmark"], *map(row.first.get, _WORKLOAD)
        if key not in found or (row.median(_WHOLE) or 0) > (found[key].median(_WHOLE) or 0):
            found[key] = row
    return list(found.values())


def summary(lines: Sequence[Line]) -> str:
    """All tables of a device; empty without results."""
    parts = [_traces(lines), _numbers(lines), _ablations(lines), prefill(lines)]
    return "\n\n".join(part for part in parts if part)


def system(line: Line) -> str:
    """Who served, with the version of what is not ours."""
    name, version = SYSTEMS[line["benchmark"]], line.get("vllm") or line.get("peft")
    return f"{name} {version}" if version else name


_WHOLE = "out_tok_s"
_RATE = "out_tok_s_steady", _WHOLE


def comparison(lines: Sequence[Line]) -> str:
    """A device's systems side by side: output tokens a second; empty without another's results."""
    cells = []
    others = [name for name in dict.fromkeys(SYSTEMS.values()) if name != OURS]
    for traces in _by_trace(lines):
        for adapters in sorted({row.first["adapters"] for row in traces}):
            at = {_name(row): row for row in traces if row.first["adapters"] == adapters}
            ours = at.get(OURS)
            cell = [_workload(traces[0].first), str(adapters) if adapters else "none"]
            cell.append(ours.spread(".0f", _WHOLE) if ours else "")
            for name in others:
                other = at.get(name)
                cell.append(other.spread(".0f", _WHOLE) if other else "")
                cell.append(_times(ours, other))
            cells.append(cell)
    versions = {SYSTEMS[line["benchmark"]]: system(line) for line in lines if _is_other(line)}
    heads = ["Trace", "adapters", f"{OURS}, tokens/s"]
    for name in others:
        heads += [versions.get(name, name), f"{OURS} ÷ {name}"]
    return table(heads, cells)


def _by_trace(lines: Sequence[Line]) -> list[list[Row]]:
    """The rows of every trace that another system has served, too."""
    traces: dict[tuple, list[Row]] = {}
    for row in best(lines):
        traces.setdefault(tuple(row.first[name] for name in _TRACE), []).append(row)
    return [found for found in traces.values() if any(_is_other(row.first) for row in found)]


def _is_other(line: Line) -> bool:
    return SYSTEMS.get(line["benchmark"], OURS) != OURS


def _name(row: Row) -> str:
    return SYSTEMS[row.first["benchmark"]]


def _times(ours: Row | None, other: Row | None) -> str:
    rate = ours and ours.median(_WHOLE)
    of = other and other.median(_WHOLE)
    return f"{rate / of:.1f}" if rate and of else ""


def _traces(lines: Sequence[Line]) -> str:
    found = rows(lines, tuple(SYSTEMS), by=_SETUP)
    found.sort(key=lambda row: (*(str(row.first[n]) for n in _TRACE), row.first["adapters"]))
    cells = [
        [
            _workload(row.first),
            str(row.first["adapters"]),
            system(row.first),
            row.spread(".0f", _WHOLE),
            row.text(".0f", "out_tok_s_steady"),
            row.text(".1f", "req_s"),
            row.text(".0%", "ratio"),
            row.text(".2f", "ttft_mean_s"),
            row.text(".0%", "attainment"),
            f"{row.text('.0f', 'itl_p50_ms')} / {row.text('.0f', 'itl_p99_ms')}",
            row.text(".0f", "loads"),
        ]
        for row in found
    ]
    heads = (
        "Trace", "adapters", "", "output tokens/s", "steady", "requests/s", "of limit",
        "first token, s", "within 6 s", "between tokens, ms, median / p99", "loads",
    )  # fmt: skip
    return table(heads, cells)


def _workload(line: Line) -> str:
    text = f"{line['setting']}, {line['rate']:g} requests/s"
    if line["popularity"] != "power" or line["alpha"] != 1:
        text += f", {line['popularity']} {line['alpha']:g}"
    text += f", cv {line['cv']:g}" if line["cv"] != 1 else ""
    return text + (", Arena's lengths" if line["lengths"] == "arena" else "")


def _numbers(lines: Sequence[Line]) -> str:
    cells = [
        [
            row.first["setting"],
            str(row.first["adapters"]),
            row.spread(".0f", *_RATE),
            row.text(".2f", "of_base"),
            row.text(".2f", "of_fewest") if row.first["adapters"] else "",
            row.text(".0%", "ratio"),
            row.text(".0f", "running_mean"),
        ]
        for row in rows(lines, ("adapters",))
    ]
    heads = (
        "Setting",
        "adapters",
        "output tokens/s",
        "of base",
        "of fewest",
        "of limit",
        "running",
    )
    return table(heads, cells)


def _ablations(lines: Sequence[Line]) -> str:
    found = rows(lines, ("ablations",), by=("variation", "pages"))
    whole = {
        _key(row.first): row.median(*_RATE) for row in found if row.first["variation"] == "unified"
    }
    cells = []
    for row in found:
        rate, unified = row.median(*_RATE), whole.get(_key(row.first))
        cells.append(
            [
                f"{row.first['setting']}, {row.first['adapters']} adapters, "
                f"{row.first['pages']} pages",
                row.first["variation"],
                row.spread(".0f", *_RATE),
                f"{rate / unified:.2f}" if rate and unified else "",
                row.text(".2f", "ttft_mean_s"),
                row.text(".0%", "attainment"),
                row.text(".0f", "running_mean"),
                row.text(".0f", "loads"),
            ]
        )
    heads = (
        "Ablation", "", "output tokens/s", "of unified", "first token, s", "within 6 s", "running",
        "loads",
    )  # fmt: skip
    return table(heads, cells)


def _key(line: Line) -> tuple:
    return tuple(line[name] for name in (*_TRACE, "batch"))


def prefill(lines: Sequence[Line]) -> str:
    cells = [
        [
            f"{line['shape']}, {line['prompt']} tokens a step",
            f"{line['adapters']} of rank {line['rank']}" if line["adapters"] else "none",
            f"{line['us'] / 1e3:.1f}",
            f"{line['tokens_per_s']:.0f}",
            f"{100 * line['ratio']:.0f} %",
        ]
        for line in lines
        if line["benchmark"] == "prefill"
    ]
    return table(("Prefill", "adapters", "ms", "tokens/s", "of the matmul's peak"), cells)


def is_plotted(line: Line) -> bool:
    return line["benchmark"] in SYSTEMS


def plot(lines: Sequence[Line]) -> str:
    """A bar for every system, trace and number of adapters: output tokens a second."""
    shown = [line for line in lines if is_plotted(line)]
    devices = dict.fromkeys(line["device"] for line in shown)
    found = [row for device in devices for row in best(x for x in shown if x["device"] == device)]
    found.sort(
        key=lambda row: (
            row.first["device"], _workload(row.first), row.first["adapters"], _name(row) != OURS,
        )
    )  # fmt: skip
    rates = [row.median(_WHOLE) or 0.0 for row in found]
    most = max(rates)
    height_of, left, width, top = 22, 400, 420, 10
    height = top + height_of * len(found) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (row, rate) in enumerate(zip(found, rates, strict=True)):
        y = top + height_of * number
        line, length = row.first, width * rate / most
        count = f"{line['adapters']} adapters" if line["adapters"] else "no adapter"
        label = f"{line['device']}, {_workload(line)}, {count}: {system(line)}"
        colour = _COLOURS[SYSTEMS[line["benchmark"]]]
        parts += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{length:.0f}" height="15" fill="{colour}"/>',
            f'<text x="{left + length + 5:.0f}" y="{y + 13}">{rate:.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])
