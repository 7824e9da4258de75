# SPDX-License-Identifier: Apache-2.0
"""Times whole decode steps of the engine, with and without adapters.

python -m benchmarks.decode --shape llama-2-7b --load dummy --batch 64 --adapters 0,resident,64 \
    --rank 16 --prompt 256 --output 128 --results benchmarks/results/decode.jsonl

All requests come at once; `step_ms` is the median time from one decode step's tokens to the next
one's while all of them decode, of several runs the median. `limit_ms` is what the weights take, in
bytes or in FLOPs, and then the keys and values and the adapters in bytes, at the ceilings measured
in the same run. `launches` are the device's kernels in a step, of a few profiled ones, and
`device_idle` is the share of `step_ms` in which none of them runs. The environment variable
SLORA_BACKEND chooses the kernels.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.device_profile import DeviceUse, device_use
from benchmarks.engine_load import (
    TRACED_STEPS,
    Compilations,
    Load,
    Run,
    run_load,
    start_engine,
)
from benchmarks.measure import Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.shapes import MODELS
from benchmarks.shared_adapters import load_shared
from benchmarks.synthetic import MODULES, adapter_elems
from slora_jax.config import LAYER_MODULES, ModelConfig

RESIDENT = "resident"
MODULE_SETS = {"attention": MODULES, "all-linear": LAYER_MODULES}


def step_work(config: ModelConfig, load: Load, context: float, item: int) -> tuple[Work, Work]:
    """What a decode step cannot avoid: with the weights, and beside them."""
    layers = config.num_hidden_layers
    of_layer = sum(math.prod(config.projection_shape(module)) for module in LAYER_MODULES)
    weights = layers * of_layer + math.prod(config.projection_shape("lm_head"))
    tokens = round(load.batch * context)
    kv = 2 * layers * config.num_key_value_heads * config.head_dim * tokens
    attention = 4 * layers * config.num_attention_heads * config.head_dim * tokens
    adapters = [load.rank_of(i % load.adapters) for i in range(load.batch) if load.adapters]
    rows = sum(adapter_elems(config, rank, load.modules) for rank in adapters)
    distinct = adapters[: load.adapters]
    read = sum(adapter_elems(config, rank, load.modules) for rank in distinct)
    base = Work(weights * item, 2 * load.batch * weights)
    return base, Work((kv + read) * item, attention + 2 * rows)


class Benchmark:
    """Measures loads, one after another, on one engine.

    Args:
        args: the command's.
        directory: an empty one, for the model and the adapters.
    """

    def __init__(self, args: argparse.Namespace, directory: Path):
        self._args = args
        self._config = MODELS[args.shape]
        self._directory = directory
        self._most = max(int(row) for row in args.adapters if row != RESIDENT)
        self._recorder = Recorder(args.results)
        self._limits = self._recorder.ceilings(small=args.shape == "tiny")
        say("starting the engine")
        start = time.perf_counter()
        self.engine = start_engine(directory, self._config, self._load(self._most))
        jax.block_until_ready(self.engine.runner.state)
        self._start_s = time.perf_counter() - start

    def _load(self, adapters: int) -> Load:
        args = self._args
        modules = MODULE_SETS[args.modules]
        return Load(args.batch, args.prompt, args.output, adapters, args.rank, modules)

    def run(self, row: str) -> None:
        """Measures and records a row: the number of adapters, or `resident`."""
        load = self._load(0 if row == RESIDENT else int(row))
        if row != "0" and not len(self.engine.adapters.store):
            self._read_adapters()
        with Compilations() as compiled:
            if row == RESIDENT:
                run_load(self.engine, self._load(self._most))
            run_load(self.engine, load)
        runs = []
        for _ in range(self._args.repetitions):
            runs.append(run_load(self.engine, load))
            say(f"adapters {row}: {1e3 * statistics.median(runs[-1].steps):.3f} ms a step")
        use = self._profile(row, load)
        self._record(load, runs, compiled.seconds, use)

    def _profile(self, row: str, load: Load) -> DeviceUse | None:
        """How busy the device is in some steps."""
        where = self._args.profile or self._directory / "profile"
        run_load(self.engine, load, trace=where / f"adapters-{row}")
        return device_use(where / f"adapters-{row}")

    def _read_adapters(self) -> None:
        """Makes the adapters known to the engine; they enter the pool when they are used."""
        start = time.perf_counter()
        load = self._load(self._most)
        shape = {"count": self._most, "ranks": load.ranks, "modules": load.modules}
        load_shared(self.engine, self._directory / "adapters", **shape)
        say(f"read {self._most} adapters in {time.perf_counter() - start:.1f} s")

    def _record(self, load: Load, runs: list[Run], compile_s: float, use: DeviceUse | None) -> None:
        timing = Timing.of([1e6 * statistics.median(run.steps) for run in runs])
        options = self.engine.options
        item = jnp.dtype(options.dtype).itemsize
        base, rest = step_work(self._config, load, runs[0].context, item)
        limit_us = self._limits.limit_us(base) + 1e6 * rest.bytes / self._limits.bandwidth
        busy = 0.0 if use is None else use.busy / TRACED_STEPS
        self._recorder.add(
            "decode",
            timing,
            Work(base.bytes + rest.bytes, base.flops + rest.flops),
            limit_us,
            shape=self._args.shape,
            load=self._args.load,
            dtype=options.dtype,
            backend=options.kernel_backend,
            batch=load.batch,
            prompt=load.prompt,
            output=load.output,
            adapters=load.adapters,
            resident=len(self.engine.adapters.cache.residents),
            rank=load.ranks[0] if len(load.ranks) == 1 else ",".join(map(str, load.ranks)),
            modules=self._args.modules,
            step_ms=round(timing.us / 1e3, 3),
            limit_ms=round(limit_us / 1e3, 3),
            tokens_per_s=round(1e6 * load.batch / timing.us, 1),
            ttft_ms=round(1e3 * statistics.median(t for run in runs for t in run.first_token), 1),
            start_s=round(self._start_s, 2),
            compile_s=round(compile_s, 2),
            launches=None if use is None else round(use.launches / TRACED_STEPS, 1),
            device_idle=None if use is None else round(1 - 1e6 * busy / timing.us, 4),
        )


def rows(text: str) -> list[str]:
    """The value of `--adapters`."""
    found = text.split(",")
    if not all(row == RESIDENT or row.isdecimal() for row in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers and {RESIDENT!r}")
    if RESIDENT in found and not any(row.isdecimal() and int(row) for row in found):
        raise argparse.ArgumentTypeError(f"{RESIDENT!r} needs a number of adapters beside it")
    return found


def ranks(text: str) -> tuple[int, ...]:
    """The value of `--rank`."""
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, required=True)
    parser.add_argument("--load", choices=["dummy"], default="dummy", help="random weights")
    parser.add_argument("--batch", type=int, default=64, help="requests")
    parser.add_argument(
        "--adapters",
        type=rows,
        default=["0"],
        metavar="N,…",
        help="distinct adapters of the requests, a row each; 0: the base model only; "
        "resident: the same while the adapters of the largest row are in the pool",
    )
    parser.add_argument(
        "--rank", type=ranks, default=(16,), metavar="R,…", help="of the adapters, in turn"
    )
    parser.add_argument(
        "--modules", choices=MODULE_SETS, default="attention", help="that the adapters adapt"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a request")
    parser.add_argument("--output", type=int, default=128, help="tokens that a request gets")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row")
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="for traces of some steps")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(args, Path(directory))
        for row in args.adapters:
            benchmark.run(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
