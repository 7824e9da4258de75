# SPDX-License-Identifier: Apache-2.0
"""Throughput as the number of adapters grows.

python -m benchmarks.adapters --setting S1 --results benchmarks/results/adapters.jsonl

The trace of `benchmarks.trace`, with more requests than can be served, once for each number of
adapters; `of_base` and `of_fewest` are output tokens a second in those of the base model alone and
of the fewest adapters in the same run.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import Recorder, say
from benchmarks.settings import add_workload_arguments, arrivals_of, runs_of
from benchmarks.trace import TraceServer, add_engine_arguments, counts, record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument(
        "--adapters",
        type=counts,
        default=[0, 1, 5, 20, 50, 100, 200, 1000, 2000],
        metavar="N,…",
        help="a row each; 0: the base model only",
    )
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    recorder = Recorder(args.results)
    ceilings = recorder.ceilings(small=args.setting == "tiny", beside="adapters")
    with tempfile.TemporaryDirectory() as directory:
        server = TraceServer(args, Path(directory), adapters=max(args.adapters))
        for run in runs_of(args):
            rates: dict[int, float] = {}
            for adapters in sorted(args.adapters):
                found, steady = server.run(arrivals_of(args, adapters))
                rate = rates[adapters] = found["out_tok_s_steady"] or found["out_tok_s"]
                fewest = next((one for one in rates if one), adapters)
                ratios = {
                    "of_base": round(rate / rates[0], 4) if 0 in rates else None,
                    "of_fewest": round(rate / rates[fewest], 4),
                }
                row = {"adapters": adapters, "run": run, "found": found, "steady": steady}
                record(recorder, "adapters", server, ceilings, args, **row, **ratios)
                say(f"{adapters} adapters: {rate} tok/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
