# SPDX-License-Identifier: Apache-2.0
"""`slora simulate`: a trace of requests, a simulated device, and what each policy makes of them."""

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich.console import Console

from slora_jax.cli import CommandError
from slora_jax.cli.options import add_scheduling_arguments, scheduling_options
from slora_jax.scheduling.options import POLICIES
from slora_jax.simulator.metrics import measure
from slora_jax.simulator.presets import PRESETS
from slora_jax.simulator.report import picture
from slora_jax.simulator.simulation import Outcome, simulate
from slora_jax.simulator.workloads import Arrival, TraceError, Workload, fitted_to, read_trace

_WORKLOAD_HELP = {
    "adapters": "how many there are; 0: the base model only",
    "rate": "requests a second",
    "seconds": "length of the trace",
    "cv": "coefficient of variation of the times between arrivals; 1: Poisson",
    "alpha": "adapters are power(alpha) distributed; 1: uniform",
    "zipf": "adapters are Zipf distributed with this exponent, instead of alpha",
    "shortest": "least tokens of a prompt and of an output",
    "longest": "prompts and outputs are shorter than that",
}
_WHOLE = ("adapters", "shortest", "longest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slora simulate`."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="a10g-s2",
        help="S-LoRA's setting: GPU, model, ranks and default workload (default: %(default)s)",
    )
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        nargs="+",
        default=["fcfs"],
        help="one or several to compare (default: fcfs)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the trace")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    parser.add_argument("--svg", metavar="FILE", help="keep what is shown as a picture")
    group = parser.add_argument_group("workload", "instead of the preset's")
    group.add_argument(
        "--trace",
        metavar="CSV",
        help="a recorded trace in the format of Azure (TIMESTAMP, ContextTokens, GeneratedTokens) "
        "or BurstGPT (Timestamp, Request tokens, Response tokens); its bursts are kept, its rate "
        "is scaled",
    )
    for field in fields(Workload):
        kind = int if field.name in _WHOLE else float
        text = _WORKLOAD_HELP[field.name]
        group.add_argument(f"--{field.name}", type=kind, metavar="N", help=text)
    add_scheduling_arguments(parser, choice=False)


def run(args: argparse.Namespace) -> int:
    """Simulates each policy on the same trace."""
    preset = PRESETS[args.preset]
    workload = _workload(args, preset.workload)
    arrivals = _arrivals(args, workload)
    console = Console(stderr=args.json, record=args.svg is not None)
    outcomes: dict[str, Outcome] = {}
    for policy in args.policy:
        options = scheduling_options(args, policy)
        try:
            outcomes[policy] = simulate(arrivals, preset.ranks, preset.server(), options)
        except ValueError as error:
            raise CommandError(str(error)) from error
    results = {name: measure(one, args.slo_first_token_s) for name, one in outcomes.items()}
    title = (
        f"{args.preset}, {len(arrivals)} requests, {workload.adapters} adapters, "
        f"{workload.rate:g} requests/s"
    )
    console.print(picture(title, outcomes, results))
    if args.svg:
        console.save_svg(args.svg, title="slora simulate")
    if args.json:
        report = {
            "preset": args.preset,
            "trace": args.trace,
            "workload": asdict(workload),
            "seed": args.seed,
            "policies": {
                name: {**asdict(metrics), "cost_model": outcomes[name].cost_model.as_dict()}
                for name, metrics in results.items()
            },
        }
        sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _workload(args: argparse.Namespace, default: Workload) -> Workload:
    given = {f.name: getattr(args, f.name) for f in fields(Workload)}
    try:
        return replace(default, **{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise CommandError(str(error)) from error


def _arrivals(args: argparse.Namespace, workload: Workload) -> list[Arrival]:
    if args.trace is None:
        return workload.arrivals(args.seed)
    try:
        return fitted_to(read_trace(Path(args.trace)), workload, args.seed)
    except TraceError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot open {args.trace}: {error.strerror}") from error
