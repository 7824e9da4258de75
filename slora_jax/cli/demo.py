# SPDX-License-Identifier: Apache-2.0
"""`slora demo`: every shipped adapter and the base model, decoded together in one batch.

The texts are checked against what each adapter was trained to do, so the exit code says whether
every request got its own adapter's tokens.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slora_jax.demo import BASE_MODEL, adapter_dirs
from slora_jax.demo.tasks import COPY, TASKS, Task, held_out_prompts

PROMPTS = ("lora in jax", "one page pool", "red panda")
BASE = "(base model)"
LEAST_ACCURACY = 0.95
_HELD_OUT_SEED = 20_311_285  # the paper's number; training drew from other texts
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(slots=True)
class Case:
    """One request and what it must give."""

    task: Task
    adapter: str | None
    prompt: str
    shown: bool  # in the table; the others only count for the accuracy
    text: str = ""
    finished: bool = False

    @property
    def right(self) -> bool:
        return self.finished and self.text == self.task.transform(self.prompt)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slora demo`."""
    parser.add_argument(
        "--held-out",
        type=int,
        default=60,
        metavar="N",
        help="prompts that no training saw, served to every adapter in the same batch "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one line of JSON, last"
    )
    parser.add_argument("--svg", metavar="FILE", help="keep what is shown as a picture")


def run(args: argparse.Namespace) -> int:
    """Serves the demo; 0 if all shown texts are right and every adapter is accurate."""
    from slora_jax import Engine  # JAX takes a second to import

    console = Console(stderr=args.json, record=args.svg is not None)
    adapters = adapter_dirs()
    engine = Engine(
        BASE_MODEL,
        adapters=adapters,
        num_pages=512,
        max_num_seqs=32,
        max_num_batched_tokens=128,
        decode_batch_sizes=(8, 32),
        max_loras=len(adapters),  # what XLA's reference operations cost grows with it
    )
    cases = make_cases(adapters, args.held_out)
    usage = serve(engine, cases, console)
    report = {
        "adapters": {
            name: {
                "rank": engine.adapters.store[name].version.rank,
                "accuracy": accuracy(case for case in cases if case.adapter == name),
            }
            for name in adapters
        },
        "pool": usage,
    }
    console.print(picture(cases, usage))
    console.print(summary(report, accuracy(c for c in cases if c.adapter is None)))
    if args.svg:
        console.save_svg(args.svg, title="slora demo")
    wrong = [case for case in cases if case.shown and not case.right]
    for case in wrong:
        wanted = case.task.transform(case.prompt)
        console.print(f"[red]wrong:[/] {case.prompt!r} gave {case.text!r}, not {wanted!r}")
    poor = [n for n, a in report["adapters"].items() if a["accuracy"] < LEAST_ACCURACY]
    if poor:
        console.print(f"[red]less than {LEAST_ACCURACY:.0%} right:[/] {', '.join(poor)}")
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 1 if wrong or poor else 0


def make_cases(adapters: Iterable[str], held_out: int) -> list[Case]:
    """The shown prompts and the held-out ones, each for every adapter and the base, interleaved."""
    tasks: list[tuple[Task, str | None]] = [(COPY, None)]
    tasks += [(TASKS[name], name) for name in adapters]
    prompts = [(prompt, True) for prompt in PROMPTS]
    prompts += [(prompt, False) for prompt in held_out_prompts(_HELD_OUT_SEED, held_out)]
    return [Case(task, name, prompt, shown) for prompt, shown in prompts for task, name in tasks]


def serve(engine: Any, cases: list[Case], console: Console) -> dict[str, Any]:
    """Serves all cases in one batch, drawing their texts as they grow.

    Returns:
        How the pool was used at its fullest.
    """
    from slora_jax import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=64)
    by_id = {engine.add_request(c.prompt, greedy, adapter=c.adapter): c for c in cases}
    fullest = engine.pool_usage()
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while engine.has_unfinished:
            for output in engine.step():
                case = by_id[output.request_id]
                case.text, case.finished = output.text, output.finished
            usage = engine.pool_usage()
            if usage["free"] < fullest["free"]:
                fullest = usage
            live.update(picture(cases, usage))
    return fullest


def picture(cases: list[Case], usage: dict[str, Any]) -> Group:
    """The table of shown texts, a line of progress, and the pool."""
    shown = [case for case in cases if case.shown]
    table = Table(
        "adapter", *PROMPTS, box=SIMPLE_HEAD, title="one batch, one page pool", title_justify="left"
    )
    for name in dict.fromkeys(case.adapter for case in shown):
        texts = (_text(case) for case in shown if case.adapter == name)
        table.add_row(name or BASE, *texts)
    done = sum(case.finished for case in cases)
    return Group(table, Text(f"{done} of {len(cases)} requests done"), pool_bar(usage))


def _text(case: Case) -> Text:
    if not case.finished:
        return Text(case.text, style="dim")
    return Text(case.text, style="" if case.right else "bold red")


def pool_bar(usage: dict[str, Any], width: int = 76) -> Text:
    """The pool's pages as a bar: KV cache, each adapter, free."""
    parts = [("KV cache", usage["kv"], "white")]
    for index, (name, pages) in enumerate(usage["adapters"].items()):
        parts.append((name, pages, _COLORS[index % len(_COLORS)]))
    bar, legend, drawn, seen = Text(), Text(), 0, 0
    for name, pages, color in parts:
        seen += pages
        end = round(width * seen / usage["pages"])
        bar.append("█" * (end - drawn), style=color)
        drawn = end
        legend.append(f"■\u00a0{name}\u00a0{pages}  ", style=color)
    bar.append("░" * (width - drawn), style="dim")
    legend.append(f"░ free {usage['free']} of {usage['pages']} pages", style="dim")
    return Text("\n").join([bar, legend, Text()])


def accuracy(cases: Iterable[Case]) -> float:
    """The share of cases that are right to the letter."""
    right = [case.right for case in cases]
    return sum(right) / len(right)


def summary(report: dict[str, Any], base: float) -> Table:
    """Rank and accuracy of each adapter, all served in one mixed batch."""
    table = Table("adapter", "rank", "pages", "right", "does", box=SIMPLE_HEAD)
    table.title, table.title_justify = "accuracy in the mixed batch", "left"
    table.add_row(BASE, "", "", f"{base:.1%}", COPY.description)
    for name, entry in report["adapters"].items():
        pages = str(report["pool"]["adapters"].get(name, "evicted"))
        right = f"{entry['accuracy']:.1%}"
        table.add_row(name, str(entry["rank"]), pages, right, TASKS[name].description)
    return table
