# SPDX-License-Identifier: Apache-2.0
"""What the project set out to reach on one H200, and what was reached.

Figures are of the committed results; one that nobody has measured yet says so.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report_traces import OURS, SYSTEMS, Row, best, rows
from benchmarks.tables import table

type Line = dict[str, Any]
type Figure = Callable[[Sequence[Line]], float | None]

DEVICE = "NVIDIA H200"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is to be reached.

    Attributes:
        name: what is measured.
        of: from the device's results to the figure; None: not measured.
        form: how it is written.
        most, least: what it is to be; neither: it is only reported.
    """

    name: str
    of: Figure
    form: str
    most: float | None = None
    least: float | None = None

    def cells(self, lines: Sequence[Line]) -> list[str]:
        value = self.of(lines)
        bound = f"≤ {self.most:{self.form}}" if self.most is not None else ""
        bound = f"≥ {self.least:{self.form}}" if self.least is not None else bound
        if value is None:
            return [self.name, bound, "not measured", ""]
        reached = (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )
        verdict = ("yes" if reached else "missed") if bound else ""
        return [self.name, bound, f"{value:{self.form}}", verdict]


def step(field: str, batch: int, adapters: int) -> Figure:
    """Of a decode step of the 7B shape, with adapters of rank 16."""

    def of(lines: Sequence[Line]) -> float | None:
        wanted: Line = {"benchmark": "decode", "shape": "llama-2-7b", "batch": batch}
        wanted |= {"prompt": 256, "modules": "attention", "backend": "mosaic"}
        found = select(lines, **wanted, adapters=adapters)
        found = [line for line in found if bool(line["resident"]) == bool(adapters)]
        return found[-1].get(field) if found else None

    return of


def many(field: str, setting: str, *adapters: int, worst: Callable = min) -> Figure:
    """The worst of some numbers of adapters, on the setting's trace at 60 requests a second."""

    def of(lines: Sequence[Line]) -> float | None:
        found = rows(select(lines, benchmark="adapters", setting=setting, rate=60.0), ("adapters",))
        medians = [row.median(field) for row in found if row.first["adapters"] in adapters]
        values = [value for value in medians if value is not None]
        return worst(values) if len(values) == len(adapters) else None

    return of


def times(benchmark: str, adapters: int) -> Figure:
    """Our output tokens a second over another server's, on S1, of whole runs."""

    def of(lines: Sequence[Line]) -> float | None:
        found = best(select(lines, setting="S1", rate=60.0, adapters=adapters))
        ours = [row for row in found if SYSTEMS[row.first["benchmark"]] == OURS]
        other = [row for row in found if row.first["benchmark"] == benchmark]
        if not ours or not other:
            return None
        return (ours[-1].median("out_tok_s") or 0.0) / (other[-1].median("out_tok_s") or 1.0)

    return of


def prefill(lines: Sequence[Line]) -> float | None:
    """The share of the matmul's peak, of prompts of 4096 tokens with an adapter of rank 16."""
    wanted = {"benchmark": "prefill", "shape": "llama-2-7b", "prompt": 4096, "rank": 16}
    found = [line["ratio"] for line in select(lines, **wanted) if line["adapters"]]
    return min(found, default=None)


def unified(lines: Sequence[Line]) -> float | None:
    """The unified pool over the best fixed split of it, on S4 with the least pages measured."""
    found = select(lines, benchmark="ablations", setting="S4")
    least = min((line["pages"] for line in found), default=None)
    by_name: dict[str, Row] = {
        row.first["variation"]: row
        for row in rows(select(found, pages=least), ("ablations",), by=("variation",))
    }
    rate = {name: row.median("out_tok_s_steady", "out_tok_s") for name, row in by_name.items()}
    splits = [value for name, value in rate.items() if name.startswith("split") and value]
    whole = rate.get("unified")
    return whole / max(splits) if whole and len(splits) >= 4 else None


def select(lines: Iterable[Line], **fields: Any) -> list[Line]:
    """Those with these values."""
    return [line for line in lines if all(line.get(n) == value for n, value in fields.items())]


_STEADY = "out_tok_s_steady"
TARGETS = (
    Target("decode step, batch 64, base, ms", step("step_ms", 64, 0), ".2f", most=6.6),
    Target("the same, 64 adapters of rank 16", step("step_ms", 64, 64), ".2f", most=7.3),
    Target("decode step, batch 256, base, ms", step("step_ms", 256, 0), ".2f", most=16.5),
    Target("the same, 256 adapters of rank 16", step("step_ms", 256, 256), ".2f", most=19.0),
    Target("decode step, batch 1, base, ms", step("step_ms", 1, 0), ".2f", most=4.2),
    Target("device idle between steps, batch 64", step("device_idle", 64, 0), ".1%", most=0.03),
    Target("the same, 64 adapters of rank 16", step("device_idle", 64, 64), ".1%", most=0.03),
    Target("S1, 5 adapters, output tokens/s", many(_STEADY, "S1", 5), ".0f", least=8300),
    Target("S1, 1000 and 2000 adapters", many(_STEADY, "S1", 1000, 2000), ".0f", least=7900),
    Target("of that with 5", many("of_fewest", "S1", 1000, 2000), ".3f", least=0.95),
    Target(
        "S1, 100 adapters and more, of the base alone",
        many("of_base", "S1", 100, 1000, 2000),
        ".3f",
        least=0.90,
    ),
    Target("S2, 2000 adapters, of that with 5", many("of_fewest", "S2", 2000), ".3f", least=0.84),
    Target("prefill, 4096 tokens, rank 16, of the matmul's peak", prefill, ".2f", least=0.60),
    Target("S1, 5 adapters, over PEFT", times("hf_peft", 5), ".1f", least=30),
    Target("S1, 100 adapters, over PEFT", times("hf_peft", 100), ".1f", least=30),
    Target("S1, 5 adapters, over vLLM", times("vllm_lora", 5), ".1f"),
    Target("S1, 1000 adapters, over vLLM", times("vllm_lora", 1000), ".1f"),
    Target("S4 in tight memory, unified pool over the best split", unified, ".2f"),
)


def summary(lines: Sequence[Line]) -> str:
    """The table of targets; empty without results of the device."""
    own = select(lines, device=DEVICE)
    cells = [target.cells(own) for target in TARGETS] if own else []
    return table((f"On one {DEVICE}", "target", "measured", "reached"), cells)
