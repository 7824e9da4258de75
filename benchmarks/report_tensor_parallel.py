# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/tensor_parallel.py` recorded, as a table and a picture; see `report.py`."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from benchmarks.tables import table

type Line = dict[str, Any]

NAME = "tensor_parallel"
PLOTTED_BATCH = 64


class Row(NamedTuple):
    """The same step on one device and on several; None where it was not measured.

    All are milliseconds. `silent` is `several` without its collectives; `base` and `base_silent`
    are the same for the base model alone.
    """

    shape: str
    batch: int
    context: int
    adapters: int
    rank: int
    devices: int
    one: float | None
    several: float
    silent: float
    base: float | None
    base_silent: float | None
    slora: float | None
    dispatch: float

    @property
    def communication(self) -> float:
        return self.several - self.silent

    @property
    def label(self) -> str:
        what = f"{self.adapters} of rank {self.rank}" if self.rank else "none"
        return f"{self.shape}: {self.where}, {what}"

    @property
    def where(self) -> str:
        return f"{self.batch}, {self.context}"


def rows(lines: Sequence[Line]) -> Iterator[Row]:
    """A row for each step on several devices under the default partition."""
    own = [line for line in lines if line["benchmark"] == NAME and line["processes"] == 1]

    def find(like: Line, **fields: Any) -> float | None:
        same = ("shape", "batch", "context", "rank")
        wanted = {name: like[name] for name in same} | fields
        found = (line for line in own if all(line[k] == v for k, v in wanted.items()))
        return next((line["step_ms"] for line in found), None)

    for line in own:
        if line["devices"] == 1 or line["silent"] or line["partition"] != "no-comm":
            continue
        here = {"devices": line["devices"], "partition": "no-comm"}
        silent = find(line, **here, silent=True)
        if silent is None:
            continue
        yield Row(
            *(line[name] for name in ("shape", "batch", "context", "adapters", "rank", "devices")),
            one=find(line, devices=1),
            several=line["step_ms"],
            silent=silent,
            base=find(line, **here, silent=False, rank=0),
            base_silent=find(line, **here, silent=True, rank=0),
            slora=find(line, devices=line["devices"], partition="slora", silent=False),
            dispatch=line["dispatch_ms"],
        )


def summary(lines: Sequence[Line]) -> str:
    """The rows of one batch size, with what the columns mean; empty without results."""
    found = _table(row for row in rows(lines) if row.batch == PLOTTED_BATCH)
    if not found:
        return ""
    return (
        "The same step on two of these cards, joined by NVLink (`--tensor-parallel-size 2`), in "
        "milliseconds. Communication is what the step takes less with its collectives left out; "
        "LoRA is what it takes less without adapters, both of the step on two. Where the host's "
        "dispatch takes as long as the step, that is the limit, and not the cards. "
        f"[tensor_parallel.md](tensor_parallel.md) has all batch sizes.\n\n{found}"
    )


def full(lines: Sequence[Line]) -> str:
    """All rows, by device, and those of one process for each card; empty without results."""
    parts = []
    for device in dict.fromkeys(line["device"] for line in lines if line["benchmark"] == NAME):
        own = [line for line in lines if line["device"] == device]
        parts += [f"Two {device}s, one process for both:", _table(rows(own))]
        pairs = _table_of_processes(own)
        if pairs:
            parts += ["One process for each, as several hosts have:", pairs]
    return "\n\n".join(parts)


def _table(found: Iterable[Row]) -> str:
    cells = [
        [
            row.shape,
            row.where,
            f"{row.adapters} of rank {row.rank}" if row.rank else "none",
            "" if row.one is None else f"{row.one:.2f}",
            f"{row.several:.2f}",
            "" if row.one is None else f"{row.one / row.several:.2f}",
            f"{100 * row.communication / row.several:.0f} %",
            _lora(row),
            "" if row.slora is None else f"{row.slora:.2f}",
            f"{row.dispatch:.1f}",
        ]
        for row in found
    ]
    heads = (
        "Decode step", "requests, context", "adapters", "one card", "two cards", "times as fast",
        "communication", "LoRA", "two, `slora`", "dispatch",
    )  # fmt: skip
    return table(heads, cells)


def _table_of_processes(lines: Sequence[Line]) -> str:
    cells = [
        [
            line["shape"],
            f"{line['batch']}, {line['context']}",
            f"{line['adapters']} of rank {line['rank']}" if line["rank"] else "none",
            f"{line['step_ms']:.2f}",
            f"{line['dispatch_ms']:.1f}",
        ]
        for line in lines
        if line["benchmark"] == NAME and line["processes"] > 1 and not line["silent"]
    ]
    heads = ("Decode step", "requests, context", "adapters", "two cards", "dispatch")
    return table(heads, cells)


def _lora(row: Row) -> str:
    if not row.rank or row.base is None:
        return ""
    return f"{100 * (row.several - row.base) / row.several:.0f} %"


def is_plotted(line: Line) -> bool:
    return line["benchmark"] == NAME and line["batch"] == PLOTTED_BATCH and line["devices"] > 1


def plot(lines: Sequence[Line]) -> str:
    """Bars of each step at one batch size: one device, and several with their communication."""
    bars = [row for row in rows(lines) if row.batch == PLOTTED_BATCH]
    height_of, left, width, top = 34, 300, 440, 30
    most = max(max(row.one or 0, row.several) for row in bars)
    height = top + height_of * len(bars) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    legend = (("#b0b0b0", "one card"), ("#4878a8", "two cards"), ("#c05030", "communication"))
    for number, (colour, text) in enumerate(legend):
        x = left + 130 * number
        parts += [
            f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/>',
            f'<text x="{x + 18}" y="18">{text}</text>',
        ]
    y = top
    for row in bars:
        parts.append(
            f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{escape(row.label)}</text>'
        )
        if row.one is not None:
            parts += _bar(left, y, width * row.one / most, "#b0b0b0", f"{row.one:.1f} ms")
        silent = width * row.silent / most
        parts += _bar(left, y + 14, silent, "#4878a8", "")
        talk = width * max(row.communication, 0) / most
        parts += _bar(left + silent, y + 14, talk, "#c05030", f"{row.several:.1f} ms")
        y += height_of
    return "\n".join([*parts, "</svg>\n"])


def _bar(x: float, y: float, length: float, colour: str, text: str) -> list[str]:
    return [
        f'<rect x="{x:.0f}" y="{y}" width="{length:.0f}" height="12" fill="{colour}"/>',
        f'<text x="{x + length + 5:.0f}" y="{y + 11}" font-size="11">{text}</text>',
    ]
