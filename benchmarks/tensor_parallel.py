# SPDX-License-Identifier: Apache-2.0
"""Times decode steps of one model on one device and on several, and what their talking takes.

python -m benchmarks.tensor_parallel --shape llama-2-7b --devices 1,2 --batch 1,32,64,128,256 \
    --context 320,2048 --ranks 16,64 --partitions no-comm,slora \
    --results benchmarks/results/tensor_parallel.jsonl

A step is what the engine dispatches for one, the choice of tokens included: the host is one step
ahead, and `step_ms` is the time from one step's tokens to the next one's. The pool is filled with
noise, and requests and adapters are entered in the tables as if they had been served. Every row is
measured a second time with the collectives left out (`silent`): what that saves is communication.
`limit_ms` is what weights, keys and values and adapters take that a device holds, at the ceilings
measured on the first one. Rows that a device has no memory for are left out, and it is said which.

By default one process drives all devices. Several can, each its own, as `slora serve` does: the
same command for each, with the variables that `slora_jax.cluster` names.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import step_work
from benchmarks.engine_load import Load
from benchmarks.measure import Ceilings, Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.shapes import MODELS
from benchmarks.synthetic import MODULES
from pallas_kernels.layout import ceil_div
from sharding.specs import REPLICATED
from slora_jax.adapters.pack import PackedAdapter, pack
from slora_jax.adapters.peft import Adapter, LoraPair
from slora_jax.cluster import ALONE, Cluster
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.core import FROM_DEVICE
from slora_jax.engine import programs
from slora_jax.engine.command import Choice, StepCommand
from slora_jax.engine.runner import ModelRunner
from slora_jax.engine.setup import Setup, set_up
from slora_jax.model.inputs import Bucket, StepInputs
from slora_jax.model.loader import dummy_weights
from slora_jax.model.weights import LlamaWeights

ADAPTERS = 64  # distinct ones, where the batch is as large
SPARE = 0.04  # of the memory, for what a step takes beside weights and pool
WARM_STEPS, STEPS = 10, 60


class Row(NamedTuple):
    """What is measured; rank 0 is the base model alone."""

    batch: int
    context: int
    rank: int

    @property
    def adapters(self) -> int:
        return min(self.batch, ADAPTERS) if self.rank else 0


class Bench:
    """One model on some devices, under one partition.

    Args:
        weights: on the devices.
        setup: the engine's, without a number of pages.
        rows: that are to be measured: those that do not fit are said and dropped.
    """

    def __init__(self, weights: LlamaWeights, setup: Setup, rows: Sequence[Row]):
        self._packed = {
            rank: _packed(setup, rank) for rank in {row.rank for row in rows if row.rank}
        }
        most = _most_pages(setup)
        self.rows = [row for row in rows if self._pages(setup, row) <= most]
        for row in rows:
            if row not in self.rows:
                needed = self._pages(setup, row)
                say(f"no memory for {row} on {setup.model.size}: {needed} of {most} pages")
        pages = max((self._pages(setup, row) for row in self.rows), default=2)
        options = replace(setup.options, num_pages=pages)
        self.setup = replace(setup, options=options)
        self.weights = weights
        self.runner = ModelRunner(weights, self.setup)
        state = self.runner.state
        self.runner.state = state._replace(pool=_noise(state.pool))

    def _pages(self, setup: Setup, row: Row) -> int:
        context = ceil_div(row.context + 1, setup.options.page_size)
        adapter = len(self._packed[row.rank].pages) if row.rank else 0
        return 1 + row.batch * context + row.adapters * adapter

    def compile(self, kinds: Sequence[tuple[Row, bool]]) -> None:
        """Compiles what the rows need, several programs at a time, into JAX's persistent cache."""
        shapes = {
            replace(self.runner.shape_of(self.command(row)), silent=silent): self.command(row)
            for row, silent in kinds
        }

        def one(shape: Any) -> None:
            packed = shapes[shape].packed
            programs.model_step.lower(
                self.weights, *self.runner.state, packed, shape=shape
            ).compile()

        # Several processes tune matmuls together, so they compile in the same order.
        with ThreadPoolExecutor(8 if jax.process_count() == 1 else 1) as threads:
            list(threads.map(one, shapes))

    def command(self, row: Row) -> StepCommand:
        batch, slots = row.batch, self.setup.options.max_num_seqs
        bucket = Bucket(batch, batch, min(batch, ADAPTERS), batch)
        each = np.arange(batch, dtype=np.int32)
        runs = np.full(row.adapters, batch // max(row.adapters, 1), np.int32)
        fields = {
            "tokens": np.full(batch, FROM_DEVICE, np.int32),
            "positions": np.full(batch, row.context - 1, np.int32),
            "row": each,
            "slot": each,
            "query_start": each,
            "query_len": np.ones(batch, np.int32),
            "context_len": np.full(batch, row.context, np.int32),
            "segment_slot": np.arange(row.adapters, dtype=np.int32),
            "segment_tokens": runs,
            "segment_rows": runs,
            "update_slot": [],
            "update_column": [],
            "update_page": [],
        }
        packed = StepInputs.pack(fields, {"update_slot": slots}, bucket)
        return StepCommand(
            bucket,
            True,
            "layers" if row.rank else "none",
            frozenset(MODULES) if row.rank else frozenset(),
            packed,
            (),
            Choice(each, None, None, None, None),
            None,
        )

    def prepare(self, row: Row) -> None:
        """Enters a row's requests and adapters in the tables."""
        options, state = self.setup.options, self.runner.state
        columns = ceil_div(row.context + 1, options.page_size)
        pages = np.arange(1, options.num_pages, dtype=np.int32)
        each = np.zeros(state.page_table.shape, np.int32)
        each[: row.batch, :columns] = pages[: row.batch * columns].reshape(row.batch, columns)
        table = self.setup.placement.put(lambda _: each, each.shape, REPLICATED)
        state = state._replace(page_table=table)
        free = pages[row.batch * columns :]
        for slot in range(row.adapters):
            packed = self._packed[row.rank]
            own = np.zeros(state.tables.pages.shape[1], np.int32)
            own[: len(packed.pages)] = free[slot * len(packed.pages) :][: len(packed.pages)]
            lines = packed.rank, packed.first_tile, 1e-4 * packed.scale
            tables = programs.install_tables(state.tables, slot, own, *lines)
            state = state._replace(tables=tables)
        self.runner.state = jax.block_until_ready(state)

    def time(self, row: Row, *, silent: bool) -> tuple[Timing, float]:
        """Of a step, and in seconds what the host took to dispatch it."""
        runner, command = self.runner, self.command(row)
        runner.shape = replace(runner.shape, silent=silent)
        ends: list[float] = []
        dispatches: list[float] = []
        previous = None
        for _ in range(WARM_STEPS + STEPS):
            start = time.perf_counter()
            result = runner.execute(command)
            dispatches.append(time.perf_counter() - start)
            if previous is not None:
                np.asarray(previous.tokens)
                ends.append(time.perf_counter())
            previous = result
        jax.block_until_ready(previous)
        us = [1e6 * (end - start) for start, end in pairwise(ends[WARM_STEPS:])]
        low, middle, high = np.quantile(us, (0.1, 0.5, 0.9)).tolist()
        return Timing(middle, low, high), statistics.median(dispatches[WARM_STEPS:])


def _packed(setup: Setup, rank: int) -> PackedAdapter:
    """An adapter of the shape that is measured, of zeros: what counts is where things lie."""
    config = setup.config

    def pair(module: str) -> LoraPair:
        inputs, outputs = config.projection_shape(module)
        a, b = (np.broadcast_to(np.float32(0), s) for s in ((rank, inputs), (outputs, rank)))
        return LoraPair(a, b, 1.0)

    layer = {module: pair(module) for module in MODULES}
    adapter = Adapter("zeros", Path(), (layer,) * config.num_hidden_layers, {}, "")
    return pack(adapter, setup.model, setup.layout, np.dtype(setup.dtype))


def _most_pages(setup: Setup) -> int:
    """Pages that there is memory for, once the weights are there."""
    item = jnp.dtype(setup.dtype).itemsize
    page = setup.config.num_hidden_layers * setup.layout.page_elems * item
    stats = [device.memory_stats() for device in setup.placement.mesh.local_devices]
    free = [one["bytes_limit"] * (1 - SPARE) - one["bytes_in_use"] for one in stats if one]
    return int(min(free) // page) if free else 1 << 14


@partial(jax.jit, donate_argnames="pool")
def _noise(pool: jax.Array) -> jax.Array:
    """Numbers between -1 and 1 without a pattern that memory or power would notice."""
    mixed = jnp.uint32(0)
    for axis, factor in enumerate((2654435761, 2246822519, 3266489917)):
        at = jax.lax.broadcasted_iota(jnp.uint32, pool.shape, axis)
        mixed = (mixed ^ at) * jnp.uint32(factor)
        mixed = mixed ^ (mixed >> 15)
    noise = (mixed & 0xFFFF).astype(jnp.float32) / 32768 - 1
    return noise.astype(pool.dtype) + 0 * pool


def _work(setup: Setup, row: Row) -> tuple[Work, Work]:
    """What a device cannot avoid: with the weights, and beside them.

    The keys and values that a device holds, and its part of every adapter, padding left out.
    """
    item = jnp.dtype(setup.dtype).itemsize
    base, rest = step_work(setup.model.local, Load(row.batch, 0, 0, 0, (0,)), row.context, item)
    per_layer = 0
    for module in MODULES:
        inputs, outputs = setup.config.projection_shape(module)
        of_inputs, of_outputs, dealt = setup.model.lora_splits(module)
        a = of_inputs.width if of_inputs else inputs
        b = of_outputs.width if of_outputs else outputs
        per_layer += a / setup.model.size if dealt else a
        per_layer += b
    lora = round(setup.config.num_hidden_layers * row.rank * per_layer)
    bytes_ = rest.bytes + row.adapters * lora * item
    return base, Work(bytes_, rest.flops + 2 * bool(row.rank) * row.batch * lora)


class Benchmark:
    """Measures rows on one device, and on several under each partition."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._config: ModelConfig = MODELS[args.shape]
        leads = jax.process_index() == 0
        self._recorder = Recorder(args.results if leads else None, quiet=not leads)
        self._limits: Ceilings = self._recorder.ceilings(
            small=args.shape == "tiny", beside="tensor_parallel"
        )

    def run(self) -> None:
        for devices in self._args.devices:
            weights = None
            for partition in self._args.partitions if devices > 1 else ("no-comm",):
                setup = self._setup(devices, partition)
                if weights is None:
                    start = time.perf_counter()
                    how = setup.model, setup.dtype, setup.placement
                    weights = jax.block_until_ready(dummy_weights(*how))
                    say(f"weights on {devices} in {time.perf_counter() - start:.1f} s")
                rows = list(self._rows(with_base=partition == self._args.partitions[0]))
                self._measure(weights, setup, rows, silence=devices > 1 and not self._args.audible)

    def _setup(self, devices: int, partition: str) -> Setup:
        options: dict[str, Any] = {
            "tensor_parallel_size": devices,
            "lora_partition": partition,
            "max_num_seqs": max(self._args.batch),
            "max_num_batched_tokens": max(self._args.batch),
            "max_model_len": max(self._args.context) + 1,
            "max_loras": ADAPTERS,
            "max_lora_rank": max(self._args.ranks),
            "dtype": "bfloat16",
        }
        return set_up(EngineConfig(**options), self._config)

    def _rows(self, *, with_base: bool) -> Iterator[Row]:
        ranks = [0, *self._args.ranks] if with_base else self._args.ranks
        for batch in self._args.batch:
            for rank in ranks:
                for context in self._args.context:
                    yield Row(batch, context, rank)

    def _measure(
        self, weights: LlamaWeights, setup: Setup, rows: Sequence[Row], *, silence: bool
    ) -> None:
        bench = Bench(weights, setup, rows)
        silences = (False, True) if silence else (False,)
        start = time.perf_counter()
        bench.compile([(row, silent) for row in bench.rows for silent in silences])
        say(f"compiled in {time.perf_counter() - start:.1f} s")
        for row in bench.rows:
            bench.prepare(row)
            for silent in silences:
                self._record(bench, row, silent)

    def _record(self, bench: Bench, row: Row, silent: bool) -> None:
        timing, dispatch = bench.time(row, silent=silent)
        setup = bench.setup
        base, rest = _work(setup, row)
        limit_us = self._limits.limit_us(base) + 1e6 * rest.bytes / self._limits.bandwidth
        self._recorder.add(
            "tensor_parallel",
            timing,
            Work(base.bytes + rest.bytes, base.flops + rest.flops),
            limit_us,
            shape=self._args.shape,
            dtype=setup.options.dtype,
            backend=setup.backend,
            devices=setup.model.size,
            processes=jax.process_count(),
            partition=setup.model.partition,
            silent=silent,
            batch=row.batch,
            context=row.context,
            adapters=row.adapters,
            rank=row.rank,
            step_ms=round(timing.us / 1e3, 3),
            limit_ms=round(limit_us / 1e3, 3),
            dispatch_ms=round(1e3 * dispatch, 3),
        )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, required=True)
    parser.add_argument("--devices", type=_numbers, default=[1, 2], metavar="N,…")
    parser.add_argument("--batch", type=_numbers, default=[64], metavar="N,…", help="requests")
    parser.add_argument(
        "--context", type=_numbers, default=[320], metavar="N,…", help="tokens of each request"
    )
    parser.add_argument(
        "--ranks", type=_numbers, default=[16], metavar="N,…", help="of the adapters, beside none"
    )
    parser.add_argument(
        "--partitions",
        type=lambda text: text.split(","),
        default=["no-comm"],
        metavar="NAME,…",
        help="no-comm, slora",
    )
    parser.add_argument("--audible", action="store_true", help="leave the silent rows out")
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")
    args = parser.parse_args(argv)
    cluster = Cluster.of()
    peers = ALONE if cluster is None else cluster.join()
    Benchmark(args).run()
    peers.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
