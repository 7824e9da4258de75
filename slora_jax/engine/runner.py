# SPDX-License-Identifier: Apache-2.0
"""Carries out step plans on the device: owns the pool and all other device state.

Nothing here waits for the device: results are handed out as arrays on their way to the host, to be
read a step later.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sharding.specs import PAGES, REPLICATED
from slora_jax.adapters.reader import CHUNKS, HostAdapter
from slora_jax.core import Install, StepPlan
from slora_jax.engine import programs
from slora_jax.engine.command import Choice, Counts, StepCommand, step_command
from slora_jax.engine.packing import buckets_of, padded
from slora_jax.engine.programs import StepShape, step_shape
from slora_jax.engine.sampler import Logprobs, TokenCounts
from slora_jax.engine.setup import Setup
from slora_jax.engine.state import new_state, state_shardings
from slora_jax.model.inputs import Bucket
from slora_jax.model.weights import LlamaWeights
from slora_jax.pool.allocator import RESERVED_PAGE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StagedAdapter:
    """An adapter in staging: the device's memory beside the pool. The copy may be under way.

    Attributes:
        chunks: `[n, L, page_elems]` each, on each device.
        tables: its lines of `LoraTables`, on the device.
        adapted: modules of layers that it adapts.
        has_outer: whether it adapts the embedding or the head.
    """

    chunks: tuple[Array, ...]
    tables: tuple[Array, ...]
    adapted: frozenset[str]
    has_outer: bool

    def is_ready(self) -> bool:
        arrays = (*self.chunks, *self.tables)
        return all(x.is_ready() for x in arrays)  # pyright: ignore[reportAttributeAccessIssue]

    def wait(self) -> None:
        jax.block_until_ready((self.chunks, self.tables))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives, still on its way from the device."""

    tokens: Array  # int32[B]
    logprobs: Logprobs | None  # of rows that asked for them, [B, k]
    prompt_logprobs: Logprobs | None  # of the token after each of the step's tokens, [T, k]


class ModelRunner:
    """The devices' side of the engine.

    Args:
        weights: on the devices.
        setup: the engine's; `num_pages` is set.

    Attributes:
        state: what lives on the devices between steps.
        shape: what all steps are compiled for; each has its own bucket and kind.
        buckets: those of the engine.
    """

    def __init__(self, weights: LlamaWeights, setup: Setup):
        self._weights = weights
        self._setup = setup
        self._options = setup.options
        # Committed to the devices from the start, as all that a step returns once an adapter has
        # been installed: JAX would compile every step again when that changes.
        fresh = partial(new_state, setup.model, setup.options, setup.layout, setup.dtype)
        self.state = jax.jit(fresh, out_shardings=state_shardings(setup.placement))()
        self._counts: TokenCounts | None = None  # made when the first request has penalties
        self._vocab = setup.config.vocab_size
        self.shape = step_shape(setup, Bucket(0, 0, 0, 0))
        self._adapted: frozenset[str] = frozenset()  # modules that some adapter has, or has had
        self.buckets = buckets_of(setup.options)
        self._outer: set[int] = set()  # adapter slots with embed_tokens or lm_head
        self._compiled: set[str] = set()
        self._compile_installs()

    def run(self, plan: StepPlan, staged: Callable[[str], StagedAdapter]) -> StepResult:
        """Dispatches installs, the model and the sampler; waits for none of them.

        Args:
            plan: the step.
            staged: gives the adapters to be installed, by id; their copies are ready.
        """
        for install in plan.installs:
            self.install(install, staged(install.adapter_id))
        return self.execute(
            step_command(plan, self.buckets, self._options, self._vocab, self._outer, self._adapted)
        )

    def execute(self, command: StepCommand) -> StepResult:
        """Dispatches the model and the sampler; the adapters are installed."""
        for counts in command.counts:
            self._start_counting(counts)
        shape = self.shape_of(command)
        with self._announced(_describe(shape)):
            logits, hidden, pool, page_table = programs.model_step(
                self._weights, *self.state, command.packed, shape=shape
            )
            self.state = self.state._replace(pool=pool, page_table=page_table)
        tokens = self._choose(command.choice, logits)
        result = StepResult(
            tokens,
            self._logprobs(command.choice, logits, tokens),
            self._prompt_logprobs(command, shape, hidden),
        )
        jax.copy_to_host_async((result.tokens, result.logprobs, result.prompt_logprobs))
        return result

    def shape_of(self, command: StepCommand) -> StepShape:
        """What a command is compiled for."""
        return replace(
            self.shape,
            bucket=command.bucket,
            decode=command.decode,
            lora_mode=command.lora_mode,
            adapted=command.adapted,
        )

    def stage(self, adapter: HostAdapter) -> StagedAdapter:
        """Starts to copy an adapter to the device.

        The copy begins when the steps dispatched so far have ended. What later steps need from the
        host comes behind it, so one of them may begin later by what the copy takes: 0.6 ms for
        32 MiB on an H100.
        """
        placement = self._setup.placement
        chunks = placement.move(adapter.chunks, PAGES)
        tables = tuple(
            placement.put(lambda _, table=table: table, table.shape, REPLICATED)
            for table in adapter.tables
        )
        return StagedAdapter(
            chunks,
            tables,
            adapted=adapter.adapted,
            has_outer=adapter.has_outer,
        )

    def expect(self, adapter: HostAdapter) -> None:
        """Has steps compiled for its modules from now on, not only once it is in the pool."""
        self._adapted |= adapter.adapted

    def install(self, install: Install, staged: StagedAdapter) -> None:
        """Writes an adapter into its pages, and its lines into the tables, before the next step."""
        first = 0
        for chunk in staged.chunks:  # the pool is donated each time: the state always has the new
            pages = np.array(install.pages[first : first + len(chunk)], np.int32)
            pool = programs.install_pages(self.state.pool, pages, chunk, mesh=self.shape.mesh)
            self.state = self.state._replace(pool=pool)
            first += len(chunk)
        tables = self.state.tables
        pages = padded(install.pages, tables.pages.shape[1], fill=0)
        tables = programs.install_tables(tables, install.adapter_slot, pages, *staged.tables)
        self.state = self.state._replace(tables=tables)
        self._outer.discard(install.adapter_slot)
        if staged.has_outer:
            self._outer.add(install.adapter_slot)
        self._adapted |= staged.adapted

    def _compile_installs(self) -> None:
        """Writes zeros over zeros, so that no running request waits for a compilation."""
        pool, placement = self.state.pool, self._setup.placement
        for size in CHUNKS:
            shape = size, pool.shape[0], pool.shape[2]
            nothing = jax.jit(
                partial(jnp.zeros, shape, pool.dtype), out_shardings=placement.sharding(PAGES)
            )()
            pages = np.full(size, RESERVED_PAGE, np.int32)
            pool = programs.install_pages(pool, pages, nothing, mesh=self.shape.mesh)
        tables = self.state.tables
        line = [
            placement.put(lambda _, x=x: np.zeros(x.shape[1:], x.dtype), x.shape[1:], REPLICATED)
            for x in (tables.rank, tables.first_tile, tables.scale)
        ]
        pages = np.full(tables.pages.shape[1], RESERVED_PAGE, np.int32)
        tables = programs.install_tables(tables, 0, pages, *line)
        self.state = self.state._replace(pool=pool, tables=tables)

    def _choose(self, choice: Choice, logits: Array) -> Array:
        """Chooses each row's next token, and keeps it for the next step."""
        bucket = logits.shape[0]
        if choice.penalties is not None:
            assert self._counts is not None
            with self._announced(f"penalties of {bucket} rows"):
                logits = programs.penalize(logits, self._counts, choice.slot, choice.penalties)
        if choice.banned is not None:
            logits = programs.ban(logits, choice.banned)
        last_token = self.state.last_token
        if choice.sampling is None:
            tokens, last_token = programs.greedy(logits, last_token, choice.slot)
        else:
            with self._announced(f"sampler of {bucket} rows"):
                tokens = programs.sample(logits, choice.sampling)
            last_token = programs.remember(last_token, choice.slot, tokens)
        if choice.penalties is not None:
            assert self._counts is not None
            self._counts = programs.count(self._counts, choice.slot, tokens)
        self.state = self.state._replace(last_token=last_token)
        return tokens

    def _logprobs(self, choice: Choice, logits: Array, tokens: Array) -> Logprobs | None:
        k = choice.logprobs
        if k is None:
            return None
        with self._announced(f"{k} log-probabilities of {logits.shape[0]} rows"):
            return programs.logprobs(logits, tokens, k=k)

    def _prompt_logprobs(
        self, command: StepCommand, shape: StepShape, hidden: Array
    ) -> Logprobs | None:
        if command.prompt_logprobs is None:
            return None
        targets, k = command.prompt_logprobs
        with self._announced(f"{k} log-probabilities of the prompts in a {_describe(shape)}"):
            return programs.prompt_logprobs(
                self._weights,
                self.state.pool,
                self.state.tables,
                command.packed,
                hidden,
                targets,
                shape=shape,
                k=k,
            )

    def _start_counting(self, counts: Counts) -> None:
        """Puts what a request has said so far into its slot's counts."""
        if self._counts is None:
            zeros = partial(TokenCounts.zeros, self._options.max_num_seqs, self._vocab)
            everywhere = self._setup.placement.sharding(REPLICATED)
            self._counts = jax.jit(zeros, out_shardings=everywhere)()
        output = np.bincount(counts.output, minlength=self._vocab).astype(np.int32)
        in_prompt = np.bincount(counts.prompt, minlength=self._vocab) > 0
        self._counts = programs.reset_counts(self._counts, counts.slot, output, in_prompt)

    @contextmanager
    def _announced(self, what: str) -> Iterator[None]:
        """Says what is compiled, and how long it took: its first call compiles a program."""
        if what in self._compiled:
            yield
            return
        logger.info("compiling the %s", what)
        start = time.monotonic()
        yield
        self._compiled.add(what)
        logger.info("compiled the %s in %.1f s", what, time.monotonic() - start)


def _describe(shape: StepShape) -> str:
    kind = "decode" if shape.decode else "mixed"
    lora = {"none": "base only", "layers": "LoRA", "all": "LoRA with embedding or head"}
    tokens, rows = shape.bucket.tokens, shape.bucket.rows
    modules = f" ({', '.join(sorted(shape.adapted))})" if shape.adapted else ""
    what = f"{kind} step of {tokens} tokens, {rows} rows, {lora[shape.lora_mode]}{modules}"
    devices = f", {shape.model.size} devices" if shape.model.size > 1 else ""
    return f"{what}, on {shape.backend}{devices}"
