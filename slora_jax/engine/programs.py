# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the engine, as jitted pure functions.

`model_step` is the whole Llama for one bucket of tokens. The sampler's programs follow it, each on
its own, so that variants add up instead of multiplying. The pool is donated to whatever writes it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import PageLayout
from pallas_kernels.backend import Backend
from slora_jax.config import LAYER_MODULES, EngineConfig, ModelConfig
from slora_jax.engine import sampler
from slora_jax.model.inputs import Bucket, StepInputs, resolve_tokens
from slora_jax.model.llama import Lora, LoraMode, LoraTables, forward, head
from slora_jax.model.weights import LlamaWeights

PROMPT_BLOCK = 64  # tokens that LoRA takes together where there are prompts
HEAD_ROWS = 64  # rows of logits that exist at once when a prompt's log-probabilities are asked for


@struct.dataclass
class StepShape:
    """What a step is compiled for. All static."""

    bucket: Bucket = struct.field(pytree_node=False)
    decode: bool = struct.field(pytree_node=False)
    lora_mode: LoraMode = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)
    config: ModelConfig = struct.field(pytree_node=False)
    layout: PageLayout = struct.field(pytree_node=False)
    backend: Backend = struct.field(pytree_node=False, default="xla")
    adapted: frozenset[str] = struct.field(pytree_node=False, default=frozenset(LAYER_MODULES))


def resolved_backend(options: EngineConfig) -> Backend:
    """The backend that an engine has chosen; "auto" is not one."""
    assert options.kernel_backend != "auto"
    return options.kernel_backend


def _lora(shape: StepShape, tables: LoraTables, inputs: StepInputs) -> Lora | None:
    if shape.lora_mode == "none":
        return None
    return Lora.of(
        tables,
        inputs.segment_slot,
        inputs.segment_tokens,
        shape.bucket.tokens,
        block=1 if shape.decode else PROMPT_BLOCK,
        max_rank=shape.max_rank,
        layout=shape.layout,
        backend=shape.backend,
        adapted=shape.adapted,
    )


@partial(jax.jit, static_argnames="shape", donate_argnames=("pool", "page_table"))
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
        config=shape.config,
        layout=shape.layout,
        decode=shape.decode,
        lora_mode=shape.lora_mode,
        backend=shape.backend,
    )
    last = hidden.at[inputs.query_start + inputs.query_len - 1].get(mode="clip")
    if lora is not None:
        rows = shape.bucket.rows
        lora = lora.over(inputs.segment_rows, rows, 1) if shape.lora_mode == "all" else None
    return head(weights, last, pool, lora, shape.config, shape.backend), hidden, pool, page_table


@partial(jax.jit, static_argnames=("shape", "k"))
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
            part = part.over(jnp.diff(inside, prepend=first), rows, 1)
        chunk = jax.lax.dynamic_slice_in_dim(hidden, first, rows)
        logits = head(weights, chunk, pool, part, shape.config, shape.backend)
        return sampler.logprobs(logits, jax.lax.dynamic_slice_in_dim(targets, first, rows), k)

    chunks = jax.lax.map(some_rows, jnp.arange(0, tokens, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], chunks)


@partial(jax.jit, donate_argnames="pool")
def install_pages(
    pool: Float[Array, "L P elems"],
    pages: Int[Array, " n"],
    contents: Float[Array, "n L elems"],
) -> Float[Array, "L P elems"]:
    """Writes a chunk of an adapter into its pages.

    Page by page: one scatter took 0.31 ms for 8 pages of a 7B model on an H100, and 4.5 ms for one
    page; these updates take 0.07 and 0.05 ms.
    """
    for page, content in zip(pages, contents, strict=True):
        pool = jax.lax.dynamic_update_slice(pool, content[:, None], (0, page, 0))
    return pool


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


greedy = jax.jit(sampler.greedy)
sample = jax.jit(sampler.sample)
penalize = jax.jit(sampler.penalize)
ban = jax.jit(sampler.ban)
count = jax.jit(sampler.count, donate_argnames="counts")
reset_counts = jax.jit(sampler.reset_counts, donate_argnames="counts")
logprobs = jax.jit(sampler.logprobs, static_argnames="k")
