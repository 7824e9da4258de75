# SPDX-License-Identifier: Apache-2.0
"""What it costs that adapters come and go while others decode.

python -m benchmarks.cold_loads --shape llama-2-7b --results benchmarks/results/cold_loads.jsonl

`cold_load`: a batch of requests decodes, and every few steps a short request comes: none, for an
adapter in the pool ("warm"), or for the same when only host memory has it ("cold"). `step_ms` is
the median time from one step's tokens to the next one's; `step_of_none` and `step_of_warm` are
medians of the ratio to the same step, with the same context, of the other runs; `ttft_ms` is the
median from a short request's arrival to its first token, `copy_ms` that of copying such an adapter
from page-locked memory to an idle device.

`adapters_curve`: as many requests at a time as fit, each for a random one of `adapters`, of which
the pool has room for `fit` at a time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.engine_load import PAGE_SIZE, Compilations
from benchmarks.measure import Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.shapes import MODELS
from benchmarks.synthetic import MODULES, write_adapters, write_model
from pallas_kernels.layout import ceil_div
from slora_jax import Engine, SamplingParams
from slora_jax.config import LAYER_MODULES
from slora_jax.pool.allocator import PageUse

NEIGHBOURS, COLD = 8, 8  # distinct adapters of those who decode, and of those who come
SPARE = 8  # rows beside the batch
WARM_UP = 45  # steps that compile what is needed, and bring all that come into the pool


@dataclass(slots=True)
class Run:
    """Seconds of steps, and from arrival to first token."""

    steps: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


class Benchmark:
    """One engine, and what is run on it.

    Args:
        args: the command's.
        directory: an empty one.
    """

    def __init__(self, args: argparse.Namespace, directory: Path):
        self._args = args
        self._directory = directory
        self._config = MODELS[args.shape]
        self._recorder = Recorder(args.results)
        self._rng = np.random.default_rng(0)
        self._length = args.prompt + args.steps + 2 * WARM_UP
        rows = args.batch + SPARE
        pages = rows * (ceil_div(self._length, PAGE_SIZE) + 1)
        say("starting the engine")
        self.engine = Engine(
            write_model(directory / "model", self._config),
            load_format="dummy",
            page_size=PAGE_SIZE,
            num_pages=pages + args.pages,
            max_model_len=self._length,
            max_num_seqs=rows,
            max_num_batched_tokens=max(2 * args.batch, rows),
            decode_batch_sizes=(rows,),
            max_loras=1024,
            max_lora_rank=64,
            max_cpu_lora_gib=args.host_gib,
            lora_load_threads=args.threads,
        )
        self._load("near", NEIGHBOURS, 16, MODULES)

    def _load(self, prefix: str, count: int, rank: int, modules: tuple[str, ...]) -> None:
        start = time.perf_counter()
        where = self._directory / prefix
        shape = {"count": count, "rank": rank, "modules": modules, "prefix": prefix}
        paths = write_adapters(where, self._config, **shape)
        read = time.perf_counter()
        self.engine.load_adapters(paths)
        end = time.perf_counter()
        nbytes = self.engine.adapters.store[f"{prefix}-0"].version.nbytes
        say(
            f"{count} adapters of {nbytes / 2**20:.0f} MiB: written in {read - start:.1f} s, "
            f"loaded in {end - read:.1f} s"
        )

    def _add(self, prompt: int, output: int, adapter: str) -> str:
        tokens = self._rng.integers(0, self._config.vocab_size, prompt).tolist()
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return self.engine.add_request(tokens, params, adapter=adapter)

    # Cold loads beside a decoding batch

    def cold_loads(self, name: str, rank: int, modules: tuple[str, ...]) -> None:
        """Measures and records arrivals of none, of warm and of cold adapters."""
        self._load(name, COLD, rank, modules)
        arrivals = itertools.cycle([f"{name}-{n}" for n in range(COLD)])
        with Compilations():
            self._run(WARM_UP, arrivals)
        version = self.engine.adapters.store[f"{name}-0"].version
        copy = self._copy_seconds(f"{name}-0")
        alone = self._run(self._args.steps, None)
        warm = self._run(self._args.steps, arrivals)
        for number in range(COLD):
            self._evict(f"{name}-{number}")
        cold = self._run(self._args.steps, arrivals, evict=True)
        for kind, run in (("none", alone), ("warm", warm), ("cold", cold)):
            us = [1e6 * seconds for seconds in run.steps]
            timing = Timing(statistics.median(us), min(us), max(us))
            found = {
                "adapter_bytes": version.nbytes,
                "copy_ms": round(1e3 * copy, 3),
                "step_ms": round(timing.us / 1e3, 3),
                "step_p99_ms": round(float(np.quantile(us, 0.99)) / 1e3, 3),
                "step_of_none": _ratio(run, alone),
                "step_of_warm": _ratio(run, warm),
            }
            if run.first_token:
                found["ttft_ms"] = round(1e3 * statistics.median(run.first_token), 3)
                found["ttft_p99_ms"] = round(1e3 * float(np.quantile(run.first_token, 0.99)), 3)
                found["arrivals"] = len(run.first_token)
            self._recorder.add(
                "cold_load",
                timing,
                Work(version.nbytes, 0),
                None,
                shape=self._args.shape,
                arrivals_are=kind,
                adapters_of=name,
                rank=rank,
                modules=len(modules),
                batch=self._args.batch,
                every=self._args.every,
                steps=len(run.steps),
                **found,
            )

    def _copy_seconds(self, name: str) -> float:
        """How long a copy to the device takes when it has nothing else to do."""
        adapters = self.engine.adapters
        adapter = adapters.host.get(adapters.store[name].version.id)
        assert adapter is not None
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            self.engine.runner.stage(adapter).wait()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def _run(self, steps: int, arrivals: Iterator[str] | None, *, evict: bool = False) -> Run:
        engine, args, run = self.engine, self._args, Run()
        cache = engine.adapters.cache
        near = itertools.cycle([f"near-{n}" for n in range(NEIGHBOURS)])
        output = self._length - args.prompt
        batch = [self._add(args.prompt, output, next(near)) for _ in range(args.batch)]
        decoding: set[str] = set()
        while len(decoding) < len(batch):
            decoding |= {one.request_id for one in engine.step()}
        for _ in range(WARM_UP // 2):
            engine.step()
        asked: dict[str, tuple[float, str]] = {}
        misses = cache.num_misses
        previous = time.perf_counter()
        for number in range(steps):
            if arrivals is not None and number % args.every == 0:
                name = next(arrivals)
                asked[self._add(args.arrival_prompt, 1, name)] = time.perf_counter(), name
            outputs = engine.step()
            now = time.perf_counter()
            run.steps.append(now - previous)
            previous = now
            for one in outputs:
                if one.request_id in asked:
                    came, name = asked.pop(one.request_id)
                    run.first_token.append(now - came)
                    if evict:
                        self._evict(name)
        for request_id in (*batch, *asked):
            engine.abort(request_id)
        list(engine.stream())
        assert not evict or cache.num_misses - misses >= len(run.first_token), "some were warm"
        return run

    def _evict(self, name: str) -> None:
        """Takes an adapter that nobody uses out of the pool."""
        adapters = self.engine.adapters
        adapter_id = adapters.store[name].version.id
        if adapter_id in adapters.cache:
            adapters.cache.evict(adapter_id)

    # More adapters than fit

    def curve(self, counts: Sequence[int], fit: int) -> None:
        """Measures and records requests for more and more adapters."""
        args, engine = self._args, self.engine
        self._load("many", max(counts), 16, MODULES)
        each = engine.adapters.store["many-0"].version.num_pages
        kv = args.batch * ceil_div(args.curve_prompt + args.curve_output, PAGE_SIZE)
        for name in list(engine.adapters.store):
            if not name.startswith("many"):
                engine.unload_adapter(name)
        room = kv + fit * each
        ballast = engine.pool.allocate(engine.pool.num_free - room, PageUse.KV)
        for count in counts:
            self._closed_loop(args.batch, count)  # compiles, and fills the pool
            cache = engine.adapters.cache
            misses, start = cache.num_misses, time.perf_counter()
            run, tokens = self._closed_loop(args.requests, count)
            seconds = time.perf_counter() - start
            us = [1e6 * one for one in run.first_token]
            self._recorder.add(
                "adapters_curve",
                Timing.of(us),
                Work(0, 0),
                None,
                shape=args.shape,
                adapters=count,
                fit=fit,
                batch=args.batch,
                requests=args.requests,
                prompt=args.curve_prompt,
                output=args.curve_output,
                loads=cache.num_misses - misses,
                ttft_ms=round(statistics.median(us) / 1e3, 3),
                ttft_p99_ms=round(float(np.quantile(us, 0.99)) / 1e3, 3),
                step_ms=round(1e3 * statistics.median(run.steps), 3),
                tokens_per_s=round(tokens / seconds, 1),
            )
        engine.pool.release(ballast)

    def _closed_loop(self, requests: int, adapters: int) -> tuple[Run, int]:
        """Serves requests, as many at a time as the batch; the run, and tokens of output."""
        args, engine, run = self._args, self.engine, Run()
        came: dict[str, float] = {}
        left, tokens = requests, 0
        running = 0
        previous = time.perf_counter()
        while left or running:
            while left and running < args.batch:
                name = f"many-{self._rng.integers(adapters)}"
                came[self._add(args.curve_prompt, args.curve_output, name)] = time.perf_counter()
                left, running = left - 1, running + 1
            outputs = engine.step()
            now = time.perf_counter()
            run.steps.append(now - previous)
            previous = now
            for one in outputs:
                tokens += len(one.new_token_ids)
                if one.request_id in came:
                    run.first_token.append(now - came.pop(one.request_id))
                running -= one.finished
        list(engine.stream())
        return run, tokens


def _ratio(run: Run, other: Run) -> float:
    """Steps of one run in those of another, step by step."""
    ratios = (a / b for a, b in zip(run.steps, other.steps, strict=True))
    return round(statistics.median(ratios), 4)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, required=True)
    parser.add_argument("--batch", type=int, default=64, help="requests that decode")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--steps", type=int, default=500, help="that are measured")
    parser.add_argument("--every", type=int, default=5, help="steps from arrival to arrival")
    parser.add_argument("--arrival-prompt", type=int, default=16, help="tokens of an arrival")
    parser.add_argument("--pages", type=int, default=512, help="of the pool, beside KV cache")
    parser.add_argument("--host-gib", type=float, default=32, help="host memory for adapters")
    parser.add_argument("--threads", type=int, default=8, help="that read adapters")
    parser.add_argument("--fit", type=int, default=96, help="curve: adapters that the pool holds")
    parser.add_argument("--requests", type=int, default=512, help="curve: in all")
    parser.add_argument("--curve-prompt", type=int, default=32, help="curve: tokens")
    parser.add_argument("--curve-output", type=int, default=64, help="curve: tokens")
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(args, Path(directory))
        benchmark.cold_loads("attention", 16, MODULES)
        benchmark.cold_loads("all-linear", 64, LAYER_MODULES)
        benchmark.curve([args.fit // 2, args.fit, 2 * args.fit, 4 * args.fit], args.fit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
