# SPDX-License-Identifier: Apache-2.0
"""Carries out step plans on the device: owns the pool and all other device state.

Nothing here waits for the device: results are handed out as arrays on their way to the host, to be
read a step later.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from pallas_kernels.layout import PageLayout
from slora_jax.adapters.reader import CHUNKS, HostAdapter
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.core import Install, Request, StepPlan
from slora_jax.engine import programs
from slora_jax.engine.packing import (
    MOST_BANNED,
    banned_ids,
    buckets_of,
    pack_step,
    padded,
    penalties,
    sampling,
)
from slora_jax.engine.programs import StepShape, resolved_backend
from slora_jax.engine.sampler import Logprobs, TokenCounts
from slora_jax.engine.state import new_state
from slora_jax.model.inputs import Bucket
from slora_jax.model.llama import LoraMode
from slora_jax.model.weights import LlamaWeights
from slora_jax.pool.allocator import RESERVED_PAGE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class StagedAdapter:
    """An adapter in staging: the device's memory beside the pool. The copy may be under way.

    Attributes:
        chunks: `[n, L, page_elems]` each.
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
    """What a step gives, still on its way from the device. Row r is `plan.rows[r]`."""

    plan: StepPlan
    tokens: Array  # int32[B]
    logprobs: Logprobs | None  # of rows that asked for them, [B, k]
    prompt_logprobs: Logprobs | None  # of the token after each of the step's tokens, [T, k]


class ModelRunner:
    """The device's side of the engine.

    Args:
        weights: on the device.
        config: the model's shape.
        options: the engine's; `num_pages` and `max_model_len` are set.
        layout: of pages.
    """

    def __init__(
        self,
        weights: LlamaWeights,
        config: ModelConfig,
        options: EngineConfig,
        layout: PageLayout,
    ):
        self._weights = weights
        self._options = options
        self._staging = SingleDeviceSharding(jax.devices()[0], memory_kind="device")
        # Committed to the device from the start, as all that a step returns once an adapter has
        # been installed: JAX would compile every step again when that changes.
        fresh = partial(new_state, config, options, layout, weights.embed_tokens.dtype)
        self.state = jax.jit(fresh, out_shardings=self._staging)()
        self._counts: TokenCounts | None = None  # made when the first request has penalties
        self._vocab = config.vocab_size
        self._shape = StepShape(
            Bucket(0, 0, 0, 0),
            False,
            "none",
            options.max_lora_rank,
            config,
            layout,
            backend=resolved_backend(options),
        )
        self._adapted: frozenset[str] = frozenset()  # modules that some adapter has, or has had
        self.buckets = buckets_of(options)
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
        for request in plan.started:
            if request.params.penalized:
                self._start_counting(request)
        lora_mode = self._lora_mode(plan)
        shape = replace(
            self._shape,
            bucket=self.buckets.of(plan),
            decode=plan.decode_only,
            lora_mode=lora_mode,
            adapted=frozenset() if lora_mode == "none" else self._adapted,
        )
        packed = jnp.asarray(pack_step(plan, shape.bucket, self._options.max_num_seqs))
        with self._announced(_describe(shape)):
            logits, hidden, pool, page_table = programs.model_step(
                self._weights, *self.state, packed, shape=shape
            )
            self.state = self.state._replace(pool=pool, page_table=page_table)
        tokens = self._sample(plan, logits)
        result = StepResult(
            plan,
            tokens,
            self._logprobs(plan, logits, tokens),
            self._prompt_logprobs(plan, shape, packed, hidden),
        )
        jax.copy_to_host_async((result.tokens, result.logprobs, result.prompt_logprobs))
        return result

    def stage(self, adapter: HostAdapter) -> StagedAdapter:
        """Starts to copy an adapter to the device.

        The copy begins when the steps dispatched so far have ended. What later steps need from the
        host comes behind it, so one of them may begin later by what the copy takes: 0.6 ms for
        32 MiB on an H100.
        """
        return StagedAdapter(
            *jax.device_put((adapter.chunks, adapter.tables), self._staging),
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
            pool = programs.install_pages(self.state.pool, pages, chunk)
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
        pool = self.state.pool
        for size in CHUNKS:
            shape = size, pool.shape[0], pool.shape[2]
            nothing = jnp.zeros(shape, pool.dtype, device=self._staging)
            pool = programs.install_pages(pool, np.full(size, RESERVED_PAGE, np.int32), nothing)
        tables = self.state.tables
        line = (x[0] for x in (tables.rank, tables.first_tile, tables.scale))
        pages = np.full(tables.pages.shape[1], RESERVED_PAGE, np.int32)
        tables = programs.install_tables(tables, 0, pages, *line)
        self.state = self.state._replace(pool=pool, tables=tables)

    def _lora_mode(self, plan: StepPlan) -> LoraMode:
        slots = {row.adapter_slot for row in plan.rows} - {None}
        if not slots:
            return "none"
        return "all" if slots & self._outer else "layers"

    def _sample(self, plan: StepPlan, logits: Array) -> Array:
        """Chooses each row's next token, and keeps it for the next step."""
        rows, bucket = plan.rows, logits.shape[0]
        unused = self._options.max_num_seqs
        slot = padded([row.slot if row.samples else unused for row in rows], bucket, unused)
        penalized = any(row.samples and row.request.params.penalized for row in rows)
        if penalized:
            assert self._counts is not None
            with self._announced(f"penalties of {bucket} rows"):
                logits = programs.penalize(logits, self._counts, slot, penalties(rows, bucket))
        banned = [banned_ids(row) for row in rows]
        if any(banned):
            ids = [padded(sorted(ids), MOST_BANNED, self._vocab) for ids in banned]
            filler = np.full((bucket - len(rows), MOST_BANNED), self._vocab, np.int32)
            logits = programs.ban(logits, np.concatenate([np.stack(ids), filler]))
        if all(row.request.params.greedy for row in rows if row.samples):
            tokens = programs.greedy(logits)
        else:
            with self._announced(f"sampler of {bucket} rows"):
                tokens = programs.sample(logits, sampling(rows, bucket, self._vocab))
        if penalized:
            assert self._counts is not None
            self._counts = programs.count(self._counts, slot, tokens)
        last_token = programs.remember(self.state.last_token, slot, tokens)
        self.state = self.state._replace(last_token=last_token)
        return tokens

    def _logprobs(self, plan: StepPlan, logits: Array, tokens: Array) -> Logprobs | None:
        asked = [row.request.params.logprobs for row in plan.rows if row.samples]
        k = self._top_k(asked)
        if k is None:
            return None
        with self._announced(f"{k} log-probabilities of {logits.shape[0]} rows"):
            return programs.logprobs(logits, tokens, k=k)

    def _prompt_logprobs(
        self, plan: StepPlan, shape: StepShape, packed: Array, hidden: Array
    ) -> Logprobs | None:
        asked = [
            row.request.params.prompt_logprobs
            for row in plan.rows
            if row.start < len(row.request.prompt) - 1
        ]
        k = self._top_k(asked)
        if k is None:
            return None
        targets: list[int] = []
        for row in plan.rows:
            following = row.request.prompt[row.start + 1 : row.start + 1 + len(row.tokens)]
            targets += following + [0] * (len(row.tokens) - len(following))
        following = padded(targets, hidden.shape[0], fill=0)
        with self._announced(f"{k} log-probabilities of the prompts in a {_describe(shape)}"):
            return programs.prompt_logprobs(
                self._weights,
                self.state.pool,
                self.state.tables,
                packed,
                hidden,
                following,
                shape=shape,
                k=k,
            )

    def _top_k(self, asked: Sequence[int | None]) -> int | None:
        """A k that covers all that was asked for, coarse so that few variants are compiled."""
        wanted = [self._vocab if k == -1 else k for k in asked if k is not None]
        if not wanted:
            return None
        most = max(wanted)
        return next((k for k in (1, 5, 20) if most <= k <= self._vocab), self._vocab)

    def _start_counting(self, request: Request) -> None:
        """Puts a request's prompt and output so far into its slot's counts."""
        if self._counts is None:
            counts = TokenCounts.zeros(self._options.max_num_seqs, self._vocab)
            self._counts = jax.device_put(counts, self._staging)
        output = np.bincount(request.output, minlength=self._vocab).astype(np.int32)
        in_prompt = np.bincount(request.prompt, minlength=self._vocab) > 0
        self._counts = programs.reset_counts(self._counts, request.slot, output, in_prompt)

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
    return f"{what}, on {shape.backend}"
