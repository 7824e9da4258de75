# SPDX-License-Identifier: Apache-2.0
"""What simulated policies made of a trace, drawn for a terminal."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from slora_jax.simulator.metrics import Metrics
from slora_jax.simulator.simulation import Outcome, Served

_BARS = " ▁▂▃▄▅▆▇█"
_SPANS = 60  # of the trace, a character each


def picture(title: str, outcomes: Mapping[str, Outcome], results: Mapping[str, Metrics]) -> Group:
    """A table of the main figures, and each policy's waits along the trace."""
    waits = {name: _waits(outcome) for name, outcome in outcomes.items()}
    longest = max((wait for one in waits.values() for wait in one), default=0.0)
    legend = f"mean wait by time of arrival, up to {longest:.1f} s; red: some were turned away"
    lines = [_line(name, waits[name], longest, outcomes[name]) for name in outcomes]
    return Group(_table(title, results), Text(legend, style="dim"), *lines)


def _table(title: str, results: Mapping[str, Metrics]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("policy", no_wrap=True, min_width=8)
    for name in ("done/s", "wait s", "99 % s", "max s", "in SLO", "content", "fair", "503"):
        table.add_column(name, justify="right", no_wrap=True)
    for policy, m in results.items():
        waits = (m.first_token_s, m.first_token_p99_s, m.worst_wait_s)
        table.add_row(
            policy,
            f"{m.throughput:.2f}",
            *(f"{wait:.1f}" for wait in waits),
            f"{m.attainment:.1%}",
            f"{m.satisfaction:.1%}",
            f"{m.fairness:.2f}",
            f"{m.rejected}",
        )
    return table


def _line(name: str, waits: Sequence[float], longest: float, outcome: Outcome) -> Text:
    rejected = {_span(one, outcome) for one in outcome.served if one.rejected is not None}
    text = Text(f"{name:<9}", no_wrap=True)
    for span, wait in enumerate(waits):
        level = int(np.ceil((len(_BARS) - 1) * wait / longest)) if longest > 0 else 0
        text.append(_BARS[level], style="red" if span in rejected else "cyan")
    return text


def _waits(outcome: Outcome) -> list[float]:
    """The mean wait for a first token of the requests that arrived in each span."""
    spans: list[list[float]] = [[] for _ in range(_SPANS)]
    for one in outcome.served:
        if one.latency is not None:
            spans[_span(one, outcome)].append(one.latency)
    return [float(np.mean(span)) if span else 0.0 for span in spans]


def _span(one: Served, outcome: Outcome) -> int:
    end = outcome.served[-1].arrival.time or 1.0
    return min(int(_SPANS * one.arrival.time / end), _SPANS - 1)
