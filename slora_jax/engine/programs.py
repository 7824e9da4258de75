# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the engine, as jitted pure functions.

`model_step` is the whole Llama for one bucket of tokens. The sampler's programs follow it, each on
its own, so that variants add up instead of multiplying. The pool is donated to whatever writes it.

What touches weights or pool runs in one `shard_map` over the mesh, where there are several devices.
The sampler's programs get logits that all devices have, and every device chooses the same tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import PageLayout
from pallas_kernels.backend import Backend
from sharding import TensorAxis
from sharding.lora import ShardedLora
from sharding.specs import PAGES, POOL, REPLICATED, weight_spec
from slora_jax.config import LAYER_MODULES
from slora_jax.engine import sampler
from slora_jax.engine.setup import Setup
from slora_jax.model.inputs import Bucket, StepInputs, resolve_tokens
from slora_jax.model.llama import Lora, LoraMode, LoraTables, forward, head
from slora_jax.model.shards import ModelShards
from slora_jax.model.weights import LlamaWeights

# Where there are prompts: tokens that LoRA takes together, and of how few in a run it takes each on
# its own, most being others' decodes.
PROMPT_BLOCK, FEW = 64, 8
HEAD_ROWS = 64  # rows of logits that exist at once when a prompt's log-probabilities are asked for

# XLA's all-reduces run on a stream of their own by default, for other work to go on beside them.
# Here none can, and going there and back costs more than the sum: on two H200s an all-reduce of
# [256, 4096] takes 23.8 us with that and 15.0 without, of [1, 4096] 19.6 and 9.5.
_IN_ORDER = {"xla_disable_hlo_passes": "async-collective-creator"}


@struct.dataclass
class StepShape:
    """What a step is compiled for. All static."""

    bucket: Bucket = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)
    model: ModelShards = struct.field(pytree_node=False)
    layout: PageLayout = struct.field(pytree_node=False)
    mesh: Mesh = struct.field(pytree_node=False)
    backend: Backend = struct.field(pytree_node=False, default="xla")
    decode: bool = struct.field(pytree_node=False, default=False)
    lora_mode: LoraMode = struct.field(pytree_node=False, default="none")
    adapted: frozenset[str] = struct.field(pytree_node=False, default=frozenset(LAYER_MODULES))
    silent: bool = struct.field(pytree_node=False, default=False)  # see `TensorAxis`

    @property
    def tensor(self) -> TensorAxis:
        return TensorAxis(self.model.size, self.silent)

    def on_mesh(self, body: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """A function that every device runs on what it holds."""
        if self.model.size == 1:
            return body
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(body, mesh=self.mesh, check_vma=False, **specs)  # kernels know no vma


def weight_specs(weights: LlamaWeights) -> Any:
    """The specs of all weights, as `weights` holds them."""

    def spec(path: Any, _: Any) -> Any:
        return weight_spec(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(spec, weights)


def step_shape(setup: Setup, bucket: Bucket, **kind: Any) -> StepShape:
    """The shape of an engine's step; `kind` are fields that are not the engine's."""
    return StepShape(
        bucket=bucket,
        max_rank=setup.options.max_lora_rank,
        model=setup.model,
        layout=setup.layout,
        mesh=setup.placement.mesh,
        backend=setup.backend,
        **kind,
    )


def _lora(shape: StepShape, tables: LoraTables, inputs: StepInputs) -> Lora | None:
    if shape.lora_mode == "none":
        return None
    partition = shape.model.partition
    return Lora.of(
        tables,
        inputs.segment_slot,
        inputs.segment_tokens,
        shape.bucket.tokens,
        block=1 if shape.decode else PROMPT_BLOCK,
        few=FEW,
        how=ShardedLora(shape.max_rank, shape.layout, shape.backend, shape.tensor, partition),
        adapted=shape.adapted,
    )


def _head(
    weights: LlamaWeights, hidden: Array, pool: Array, lora: Lora | None, shape: StepShape
) -> Float[Array, "n V"]:
    model = shape.model
    static = model.local, shape.backend, shape.tensor, model.config.vocab_size
    return head(weights, hidden, pool, lora, *static)


@partial(
    jax.jit,
    static_argnames="shape",
    donate_argnames=("pool", "page_table"),
    compiler_options=_IN_ORDER,
)
def model_step(
    weights: LlamaWeights,
    pool: Float[Array, "L P elems"],
    page_table: Int[Array, "slots N"],
    last_token: Int[Array, " slots"],
    tables: LoraTables,
    packed: Int[Array, " n"],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "B V"], Float[Array, "T E"], Array, Array]:
    """One step of the model.

    Returns:
        float32 logits of each row's last token, all tokens' final hidden states, the pool and the
        page table.
    """
    step = shape.on_mesh(
        partial(_model_step, shape=shape),
        in_specs=(weight_specs(weights), POOL, *[REPLICATED] * 4),
        out_specs=(REPLICATED, REPLICATED, POOL, REPLICATED),
    )
    return step(weights, pool, page_table, last_token, tables, packed)


def _model_step(weights, pool, page_table, last_token, tables, packed, *, shape: StepShape):
    """What one device does of `model_step`."""
    inputs = StepInputs.unpack(packed, shape.bucket)
    page_table = page_table.at[inputs.update_slot, inputs.update_column].set(
        inputs.update_page, mode="drop"
    )
    lora = _lora(shape, tables, inputs)
    hidden, pool = forward(
        weights,
        pool,
        page_table,
        resolve_tokens(inputs, last_token),
        inputs,
        lora,
        config=shape.model.local,
        layout=shape.layout,
        decode=shape.decode,
        lora_mode=shape.lora_mode,
        backend=shape.backend,
        tensor=shape.tensor,
    )
    last = hidden  # of a decode step every row is one token
    if not shape.decode:
        last = hidden.at[inputs.query_start + inputs.query_len - 1].get(mode="clip")
    if lora is not None:
        rows = shape.bucket.rows
        lora = lora.over(inputs.segment_rows, rows) if shape.lora_mode == "all" else None
    return _head(weights, last, pool, lora, shape), hidden, pool, page_table


@partial(jax.jit, static_argnames=("shape", "k"), compiler_options=_IN_ORDER)
def prompt_logprobs(
    weights: LlamaWeights,
    pool: Float[Array, "L P elems"],
    tables: LoraTables,
    packed: Int[Array, " n"],
    hidden: Float[Array, "T E"],
    targets: Int[Array, " T"],
    *,
    shape: StepShape,
    k: int,
) -> sampler.Logprobs:
    """Log-probabilities of `targets`, each the token after its position; a few rows at a time."""
    found = shape.on_mesh(
        partial(_prompt_logprobs, shape=shape, k=k),
        in_specs=(weight_specs(weights), POOL, *[REPLICATED] * 4),
        out_specs=REPLICATED,
    )
    return found(weights, pool, tables, packed, hidden, targets)


def _prompt_logprobs(weights, pool, tables, packed, hidden, targets, *, shape: StepShape, k: int):
    """What one device does of `prompt_logprobs`."""
    inputs = StepInputs.unpack(packed, shape.bucket)
    lora = _lora(shape, tables, inputs) if shape.lora_mode == "all" else None
    ends = jnp.cumsum(inputs.segment_tokens)
    tokens = hidden.shape[0]
    rows = min(HEAD_ROWS, tokens)
    missing = -tokens % rows  # whole chunks only: a slice past the end would be moved back
    hidden, targets = jnp.pad(hidden, ((0, missing), (0, 0))), jnp.pad(targets, (0, missing))

    def some_rows(first: Int[Array, ""]) -> sampler.Logprobs:
        part = lora
        if part is not None:
            inside = jnp.clip(ends, first, first + rows)
            part = part.over(jnp.diff(inside, prepend=first), rows)
        chunk = jax.lax.dynamic_slice_in_dim(hidden, first, rows)
        logits = _head(weights, chunk, pool, part, shape)
        return sampler.logprobs(logits, jax.lax.dynamic_slice_in_dim(targets, first, rows), k)

    chunks = jax.lax.map(some_rows, jnp.arange(0, tokens, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], chunks)


@partial(jax.jit, static_argnames="mesh", donate_argnames="pool")
def install_pages(
    pool: Float[Array, "L P elems"],
    pages: Int[Array, " n"],
    contents: Float[Array, "n L elems"],
    *,
    mesh: Mesh,
) -> Float[Array, "L P elems"]:
    """Writes a chunk of an adapter into its pages.

    Page by page: one scatter took 0.31 ms for 8 pages of a 7B model on an H100, and 4.5 ms for one
    page; these updates take 0.07 and 0.05 ms.
    """

    def write(pool, pages, contents):
        for page, content in zip(pages, contents, strict=True):
            pool = jax.lax.dynamic_update_slice(pool, content[:, None], (0, page, 0))
        return pool

    if mesh.size > 1:
        specs = {"in_specs": (POOL, REPLICATED, PAGES), "out_specs": POOL}
        write = jax.shard_map(write, mesh=mesh, check_vma=False, **specs)
    return write(pool, pages, contents)


@partial(jax.jit, donate_argnames="tables")
def install_tables(
    tables: LoraTables,
    slot: Int[Array, ""],
    pages: Int[Array, " N"],
    rank: Int[Array, "L+1 M"],
    first_tile: Int[Array, "L+1 M"],
    scale: Float[Array, "L+1 M"],
) -> LoraTables:
    """Writes an adapter's line of every table."""
    return LoraTables(
        tables.pages.at[slot].set(pages),
        tables.rank.at[slot].set(rank),
        tables.first_tile.at[slot].set(first_tile),
        tables.scale.at[slot].set(scale),
    )


@partial(jax.jit, donate_argnames="last_token")
def remember(
    last_token: Int[Array, " slots"], slot: Int[Array, " B"], tokens: Int[Array, " B"]
) -> Int[Array, " slots"]:
    """Keeps each row's new token where the next step finds it; slots out of range are padding."""
    return last_token.at[slot].set(tokens, mode="drop")


@partial(jax.jit, donate_argnames="last_token")
def greedy(
    logits: Float[Array, "B V"], last_token: Int[Array, " slots"], slot: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " slots"]]:
    """The likeliest tokens, and `remember` of them: one dispatch less for the commonest step."""
    tokens = sampler.greedy(logits)
    return tokens, last_token.at[slot].set(tokens, mode="drop")


sample = jax.jit(sampler.sample)
penalize = jax.jit(sampler.penalize)
ban = jax.jit(sampler.ban)
count = jax.jit(sampler.count, donate_argnames="counts")
reset_counts = jax.jit(sampler.reset_counts, donate_argnames="counts")
logprobs = jax.jit(sampler.logprobs, static_argnames="k")
