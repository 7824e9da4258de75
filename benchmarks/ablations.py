# SPDX-License-Identifier: Apache-2.0
"""What each idea is worth: the same trace with and without it, on one engine.

python -m benchmarks.ablations --setting S4 --adapters 400 --pages 4096 --rate 20 --duration 60 \
    --results benchmarks/results/ablations.jsonl

`unified`: one pool for KV cache and adapters. `split`: adapters have a fixed share of it, of four.
`no prefetch`: an adapter is fetched when its request is next, not before. `cluster`, `lcfs`,
`abort`: other policies than first come, first served. `padded`: all adapters have the largest rank,
as kernels that pad see them. `base` and `one adapter`: what a merged adapter could save at most.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fixed_split import split
from benchmarks.record import Recorder, say
from benchmarks.settings import SETTINGS, add_workload_arguments, arrivals_of, runs_of
from benchmarks.trace import TraceServer, add_engine_arguments, record
from slora_jax.scheduling.choice import make_policy
from slora_jax.scheduling.options import SchedulingOptions


@dataclass(frozen=True, slots=True)
class Variation:
    """Something that is done to a server, and undone.

    Attributes:
        on: does it, for as long as the context lasts.
        adapters: that the trace asks for; None: as many as the command says.
        fields: of the result.
    """

    on: Callable[[TraceServer], AbstractContextManager[None]]
    adapters: int | None = None
    fields: Mapping[str, Any] | None = None


def policy(**options: Any) -> Variation:
    """Other options of the scheduling."""

    @contextmanager
    def on(server: TraceServer) -> Iterator[None]:
        scheduler, before = server.engine.scheduler, server.engine.scheduler.policy
        scheduling, step_tokens = SchedulingOptions(**options), server.step_tokens
        scheduler.policy = make_policy(scheduling, server.log.learning, step_tokens)
        yield
        scheduler.policy = before

    return Variation(on, fields=options)


def fixed_split(share: float) -> Variation:
    """A share of the pool for adapters, and the rest for KV cache."""

    @contextmanager
    def on(server: TraceServer) -> Iterator[None]:
        split(server.engine, share)
        yield
        split(server.engine, None)

    return Variation(on, fields={"adapter_share": share})


def as_it_is(adapters: int | None = None) -> Variation:
    return Variation(lambda server: nullcontext(), adapters)


VARIATIONS = {
    "unified": as_it_is(),
    "split 15 %": fixed_split(0.15),
    "split 30 %": fixed_split(0.3),
    "split 45 %": fixed_split(0.45),
    "split 60 %": fixed_split(0.6),
    "no prefetch": policy(prefetch_lookahead=1),
    "cluster": policy(scheduling_policy="cluster", cluster_adapters=32),
    "lcfs": policy(scheduling_policy="lcfs"),
    "abort": policy(scheduling_policy="abort"),
    "base": as_it_is(0),
    "one adapter": as_it_is(1),
}
PADDED = "padded"  # on an engine of its own: its adapters are others


def names(text: str) -> list[str]:
    """The value of `--variations`."""
    found = text.split(",")
    for name in found:
        if name not in (*VARIATIONS, PADDED):
            known = ", ".join((*VARIATIONS, PADDED))
            raise argparse.ArgumentTypeError(f"no variation {name!r}: there are {known}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument("--adapters", type=int, default=400, help="that the trace asks for")
    parser.add_argument(
        "--variations", type=names, default=[*VARIATIONS, PADDED], metavar="NAME,…", help="or all"
    )
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    recorder = Recorder(args.results)
    ceilings = recorder.ceilings(small=args.setting == "tiny", beside="ablations")

    def run_all(server: TraceServer, variations: Mapping[str, Variation]) -> None:
        for run in runs_of(args):
            for name, one in variations.items():
                adapters = args.adapters if one.adapters is None else one.adapters
                with one.on(server):
                    found, steady = server.run(arrivals_of(args, adapters))
                row = {"adapters": adapters, "run": run, "found": found, "steady": steady}
                fields = {"variation": name, **(one.fields or {})}
                record(recorder, "ablations", server, ceilings, args, **row, **fields)
                say(f"{name}: {found['out_tok_s_steady'] or found['out_tok_s']} tok/s")

    with tempfile.TemporaryDirectory() as directory:
        server = TraceServer(args, Path(directory, "exact"), adapters=args.adapters)
        run_all(server, {name: VARIATIONS[name] for name in args.variations if name != PADDED})
        if PADDED in args.variations:
            del server
            gc.collect()  # its memory is needed, and it refers to itself
            ranks = (max(SETTINGS[args.setting].ranks),)
            options = {"adapters": args.adapters, "ranks": ranks}
            server = TraceServer(args, Path(directory, PADDED), **options)
            run_all(server, {PADDED: as_it_is()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
