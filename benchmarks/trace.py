# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's synthetic workload through the engine, in real time.

python -m benchmarks.trace --setting S1 --adapters 0,5,100,1000,2000 --rate 60 --duration 60 \
    --results benchmarks/results/trace.jsonl

Requests come for `duration` seconds, whether or not the engine keeps up, and the run ends then,
with --drain when the last one has ended. Greedy, `ignore_eos`, random token ids, no prefix cache.
Names share host memory (`host_copies`), pages in the pool are each adapter's own.

`limit_us` is what an output token of the steady window takes at best: in each of its steps the
weights, in bytes or in FLOPs, and then keys, values and adapters in bytes, at the ceilings measured
in the same run.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine_load import PAGE_SIZE, Compilations
from benchmarks.measure import Ceilings, Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.replay import Given, replay
from benchmarks.settings import (
    SETTINGS,
    add_result_arguments,
    add_workload_arguments,
    arrivals_of,
    prompts_of,
    runs_of,
    workload_fields,
)
from benchmarks.shared_adapters import load_shared, name_of
from benchmarks.synthetic import adapter_elems, write_model
from benchmarks.trace_figures import figures
from slora_jax import Engine, SamplingParams
from slora_jax.config import LAYER_MODULES, ModelConfig
from slora_jax.core import FinishReason
from slora_jax.pool.allocator import PageUse
from slora_jax.scheduling.cost_model import CostModel, StepLoad
from slora_jax.simulator.workloads import Arrival


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run: when it ended, what it had to do, and what the pool held then."""

    end: float
    load: StepLoad
    running: int
    kv_pages: int
    adapter_pages: int


class StepLog(CostModel):
    """In the place of an engine's cost model, which goes on learning: remembers every step."""

    def __init__(self, engine: Engine):
        super().__init__()
        self._engine = engine
        self.learning = engine.cost_model  # the policy predicts with this one
        self.steps: list[Step] = []
        self.start = 0.0

    def observe(self, load: StepLoad, seconds: float) -> None:
        self.learning.observe(load, seconds)
        pool, now = self._engine.pool, time.perf_counter() - self.start
        kv, adapters = pool.num_used(PageUse.KV), pool.num_used(PageUse.ADAPTER)
        self.steps.append(Step(now, load, len(self._engine.scheduler.running), kv, adapters))

    def restart(self) -> None:
        self.steps = []
        self.start = time.perf_counter()


def least_seconds(
    config: ModelConfig, steps: Sequence[Step], item: int, ceilings: Ceilings
) -> float:
    """What steps take at best: weights in bytes or FLOPs, then keys, values and adapters."""
    of_layer = sum(math.prod(config.projection_shape(module)) for module in LAYER_MODULES)
    weights = config.num_hidden_layers * of_layer + math.prod(config.projection_shape("lm_head"))
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    rank = adapter_elems(config, 1)
    seconds = 0.0
    for step in steps:
        base = Work(weights * item, 2 * weights * step.load.tokens)
        beside = (kv * step.load.context + rank * step.load.rank_sum) * item
        seconds += 1e-6 * ceilings.limit_us(base) + beside / ceilings.bandwidth
    return seconds


class TraceServer:
    """One engine for a setting, and traces that are run on it.

    Args:
        args: of `add_workload_arguments` and `add_engine_arguments`.
        directory: an empty one.
        adapters: most that a trace asks for.
        ranks: of the adapters; None: the setting's.
        **options: of `EngineConfig`, instead of those that the arguments lead to.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        directory: Path,
        *,
        adapters: int,
        ranks: Sequence[int] | None = None,
        **options: Any,
    ):
        setting = SETTINGS[args.setting]
        self._args = args
        self._config = setting.config
        say("starting the engine")
        start = time.perf_counter()
        chosen = {
            "load_format": "dummy",
            "page_size": PAGE_SIZE,
            "num_pages": args.pages,
            "max_model_len": 2 * setting.longest,
            "max_num_seqs": args.batch,
            "max_num_batched_tokens": args.step_tokens,
            "decode_batch_sizes": (args.batch,),
            "max_loras": max(adapters + len(setting.ranks), 1),
            "max_lora_rank": max(ranks or setting.ranks),
        }
        self.engine = Engine(write_model(directory / "model", self._config), **(chosen | options))
        jax.block_until_ready(self.engine.runner.state)
        say(f"started in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        self.ranks = tuple(ranks or setting.ranks)
        self.host_copies = load_shared(
            self.engine, directory / "adapters", count=adapters, ranks=self.ranks
        )
        say(f"{adapters} adapters in {time.perf_counter() - start:.1f} s")
        self.log = StepLog(self.engine)
        self.engine.cost_model = self.log
        self._warmed: set[bool] = set()
        self._prompts: list[list[int]] = []  # of the trace that runs

    @property
    def step_tokens(self) -> int:
        return self.engine.options.max_num_batched_tokens

    def warm_up(self, lora: bool) -> None:
        """Compiles all steps that a trace takes, with or without adapters."""
        if lora in self._warmed:
            return
        self._warmed.add(lora)
        engine, longest = self.engine, 2 * SETTINGS[self._args.setting].longest - 2
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        adapter = name_of(0) if lora else None
        buckets = engine.runner.buckets
        loads = [[1] * rows for rows in buckets.decode_sizes]
        for tokens in buckets.mixed_sizes:
            whole, rest = divmod(tokens, longest)
            loads.append([longest] * whole + [rest] * bool(rest))
        with Compilations():
            for lengths in loads:
                prompts = [[0] * length for length in lengths]
                engine.generate(prompts, params, adapters=adapter)

    def run(self, arrivals: Sequence[Arrival], *, drain: bool = False) -> tuple[dict, list[Step]]:
        """Serves a trace; its figures, and the steps of its steady window."""
        self.warm_up(any(one.adapter is not None for one in arrivals))
        engine = self.engine
        self._prompts = prompts_of(self._args, arrivals)
        before, seconds = self._counters(), self._args.duration
        self.log.restart()
        served, end = replay(self, arrivals, seconds, drain=drain)
        found = figures(served, end, seconds)
        names = ("hits", "loads", "evictions", "preemptions")
        after = self._counters()
        found |= {name: b - a for name, a, b in zip(names, before, after, strict=True)}
        window = found["steady_from_s"] or 0.0, found["steady_to_s"] or end
        steady = [step for step in self.log.steps if window[0] <= step.end < window[1]]
        for request in list(engine.scheduler.requests):
            engine.abort(request.id)
        list(engine.stream())
        engine.check()
        return found | _pool_use(steady, engine.pool.capacity), steady

    def _counters(self) -> tuple[int, ...]:
        cache = self.engine.adapters.cache
        preemptions = self.engine.scheduler.num_preemptions
        return cache.num_hits, cache.num_misses, cache.num_evictions, preemptions

    # For `replay`

    @property
    def is_busy(self) -> bool:
        return self.engine.has_unfinished

    def add(self, number: int, one: Arrival) -> str:
        params = SamplingParams(temperature=0, max_tokens=one.output, ignore_eos=True)
        adapter = None if one.adapter is None else name_of(one.adapter)
        return self.engine.add_request(self._prompts[number], params, adapter=adapter)

    def step(self) -> list[Given]:
        given = []
        for output in self.engine.step():
            if output.finish_reason is FinishReason.REJECTED:
                continue  # turned away by the policy
            assert output.finish_reason in (None, FinishReason.LENGTH), output.stop_reason
            tokens, waited = len(output.new_token_ids), output.queue_seconds or 0.0
            given.append(Given(output.request_id, tokens, waited))
        return given

    def least_seconds(self, steps: Sequence[Step], ceilings: Ceilings) -> float:
        item = jnp.dtype(self.engine.options.dtype).itemsize
        return least_seconds(self._config, steps, item, ceilings)


def _pool_use(steps: Sequence[Step], capacity: int) -> dict[str, Any]:
    """Means over steps."""

    def mean(values: list[int]) -> float:
        return round(float(np.mean(values)), 1) if values else 0.0

    return {
        "steps": len(steps),
        "pages": capacity,
        "kv_pages_mean": mean([step.kv_pages for step in steps]),
        "adapter_pages_mean": mean([step.adapter_pages for step in steps]),
        "running_mean": mean([step.running for step in steps]),
        "step_tokens_mean": mean([step.load.tokens for step in steps]),
        "rank_sum_mean": mean([step.load.rank_sum for step in steps]),
    }


def record(
    recorder: Recorder,
    benchmark: str,
    server: TraceServer,
    ceilings: Ceilings,
    args: argparse.Namespace,
    *,
    adapters: int,
    run: int,
    found: dict[str, Any],
    steady: Sequence[Step],
    **fields: Any,
) -> None:
    """Adds the line of a run: `us` is the time of an output token in the steady window."""
    rate = found["out_tok_s_steady"] or found["out_tok_s"]
    least = server.least_seconds(steady, ceilings)
    begin, end = found["steady_from_s"] or 0.0, found["steady_to_s"] or found["seconds"]
    tokens = max(rate * (end - begin), 1.0)
    us = 1e6 / max(rate, 1e-9)
    of_run = {
        **workload_fields(args, adapters),
        "ranks": server.ranks,
        "dtype": server.engine.options.dtype,
        "backend": server.engine.options.kernel_backend,
        "batch": args.batch,
        "step_tokens": args.step_tokens,
        "host_copies": server.host_copies,
        "run": run,
        **found,
        **fields,
    }
    recorder.add(benchmark, Timing(us, us, us), Work(0, 0), 1e6 * least / tokens, **of_run)


def counts(text: str) -> list[int]:
    """The value of `--adapters`."""
    return [int(part) for part in text.split(",")]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What `TraceServer` reads beside the workload."""
    parser.add_argument("--batch", type=int, default=256, help="most requests that run")
    parser.add_argument("--step-tokens", type=int, default=512, help="most tokens of a step")
    parser.add_argument(
        "--pages", type=int, help="of the pool; all that there is room for if unset"
    )
    add_result_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument(
        "--adapters", type=counts, default=[100], metavar="N,…", help="a row each; 0: the base only"
    )
    parser.add_argument("--drain", action="store_true", help="serve to the last request")
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    recorder = Recorder(args.results)
    ceilings = recorder.ceilings(small=args.setting == "tiny", beside="trace")
    with tempfile.TemporaryDirectory() as directory:
        server = TraceServer(args, Path(directory), adapters=max(args.adapters))
        for run in runs_of(args):
            for adapters in args.adapters:
                found, steady = server.run(arrivals_of(args, adapters), drain=args.drain)
                row = {"adapters": adapters, "run": run, "found": found, "steady": steady}
                record(recorder, "trace", server, ceilings, args, **row, drain=args.drain)
                say(f"{adapters} adapters: {found['out_tok_s_steady'] or found['out_tok_s']} tok/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
