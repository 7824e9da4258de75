# SPDX-License-Identifier: Apache-2.0
"""A Llama over the page pool: pure functions of weights, pool and step inputs.

LoRA is added to each projection's output, never merged into its weight, by kernels that read the
adapters' matrices from the pool.

The code is that of one device, which holds a smaller model of the same hidden size: `config` is the
shape of that (`ModelShards.local`). Where the parts of several devices make a whole, it says
`tensor.sum` or `tensor.gather_columns`: twice a layer, for the embedding and for the logits.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    Adapters,
    Modules,
    PageLayout,
    paged_decode,
    paged_prefill,
    rope_kv_write,
    silu_gated,
)
from pallas_kernels.backend import Backend
from pallas_kernels.segments import with_work
from sharding import TensorAxis
from sharding.lora import ShardedLora
from sharding.specs import ROW_PARALLEL
from slora_jax.config import LAYER_MODULES, OUTER_MODULES, ModelConfig
from slora_jax.model.inputs import StepInputs
from slora_jax.model.rope import rotation
from slora_jax.model.weights import LayerWeights, Linear, LlamaWeights

LoraMode = Literal["none", "layers", "all"]  # "all": some adapter has embed_tokens or lm_head too


@struct.dataclass
class LoraTables:
    """Where every resident adapter lies; written when one is installed. Alike on all devices.

    Line L of the layer axis holds the modules that belong to no layer, in the order of
    `OUTER_MODULES`. Where A and B are found apart (`sharding.lora`), C = 2M: A of all modules, then
    B. Otherwise C = M.
    """

    pages: Int[Array, "A N"]
    rank: Int[Array, "A L+1 C"]  # of the adapter: a device may hold fewer
    first_tile: Int[Array, "A L+1 C"]
    scale: Float[Array, "A L+1 C"]


@struct.dataclass
class Lora:
    """The adapters of one step. Static: how they are dealt out and read."""

    adapters: Adapters
    how: ShardedLora = struct.field(pytree_node=False)
    adapted: frozenset[str] = struct.field(pytree_node=False)  # modules that any adapter has

    @classmethod
    def of(
        cls,
        tables: LoraTables,
        slot: Int[Array, " G"],
        length: Int[Array, " G"],
        tokens: int,
        block: int,
        few: int,
        how: ShardedLora,
        adapted: frozenset[str],
    ) -> "Lora":
        """Runs of `length` tokens, of `tokens` in all, on the adapters in slots `slot`."""
        rank = _held(tables.rank[slot], how)
        lines = tables.pages[slot], rank, tables.first_tile[slot], tables.scale[slot]
        size = {"layout": how.layout, "tokens": tokens, "block": block, "few": few}
        return cls(with_work(length, *lines, **size), how, adapted)

    def over(self, length: Int[Array, " G"], tokens: int) -> "Lora":
        """The same adapters over other tokens, single ones."""
        old = self.adapters
        lines = old.pages, old.rank, old.first_tile, old.scale
        size = {"layout": self.how.layout, "tokens": tokens}
        return replace(self, adapters=with_work(length, *lines, **size))


def _held(rank: Int[Array, "G L+1 C"], how: ShardedLora) -> Int[Array, "G L+1 C"]:
    """The ranks that this device holds: where A is dealt out by ranks, only a share."""
    if not how.in_halves:
        return rank
    dealt = np.zeros(rank.shape[1:], bool)
    dealt[:-1, : len(LAYER_MODULES)] = [name not in ROW_PARALLEL for name in LAYER_MODULES]
    dealt[-1, : len(OUTER_MODULES)] = [name not in ROW_PARALLEL for name in OUTER_MODULES]
    return jnp.where(dealt, how.tensor.rank_share(rank), rank)


def rms_norm(x: Float[Array, "T E"], weight: Float[Array, " E"], eps: float) -> Float[Array, "T E"]:
    """Root-mean-square norm, computed in float32, scaled in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def project(
    linear: Linear,
    x: Float[Array, "T I"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    lora: Lora | None,
    names: tuple[str, ...],
    config: ModelConfig,
    backend: Backend,
) -> Float[Array, "T O"]:
    """The fused projection `names`, with each token's own adapter added.

    Of a row-parallel one it is this device's part of the sum.
    """
    # A token's gates are the same numbers whether or not others' gates are adapted in its step.
    y = linear(x, backend, whole=names[0] == "gate_proj")
    if lora is None or lora.adapted.isdisjoint(names):
        return y
    outputs = tuple(config.projection_shape(name)[1] for name in names)
    modules = Modules(LAYER_MODULES.index(names[0]), x.shape[1], outputs)
    row = names[0] in ROW_PARALLEL
    add = lora.how.row_parallel if row else lora.how.column_parallel
    return add(x, y, pool, layer, lora.adapters, modules)


@struct.dataclass
class Attention:
    """What every layer's attention needs to know of the step."""

    inputs: StepInputs
    page_table: Int[Array, "B N"]
    page: Int[Array, " T"]  # of each token's new key and value
    offset: Int[Array, " T"]
    cos: Float[Array, "T D/2"]
    sin: Float[Array, "T D/2"]
    layout: PageLayout = struct.field(pytree_node=False)
    decode: bool = struct.field(pytree_node=False)  # every row is one token: T = B
    backend: Backend = struct.field(pytree_node=False)

    def __call__(
        self,
        qkv: Float[Array, "T O"],
        pool: Float[Array, "L P elems"],
        layer: Int[Array, ""],
        heads: int,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "L P elems"]]:
        """Stores the new keys and values, then attends over all of each request's."""
        static: Any = {"layout": self.layout, "backend": self.backend}
        where = self.cos, self.sin, self.page, self.offset
        q, pool = rope_kv_write(pool, layer, qkv, *where, heads=heads, **static)
        step, table = self.inputs, self.page_table
        if self.decode:
            return paged_decode(q, pool, layer, table, step.context_len, **static), pool
        spans = step.query_start, step.query_len, step.context_len
        return paged_prefill(q, pool, layer, table, *spans, **static), pool


@partial(jax.jit, static_argnames=("config", "tensor"))
def decoder_layer(
    x: Float[Array, "T E"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    weights: LayerWeights,
    attention: Attention,
    lora: Lora | None,
    config: ModelConfig,
    tensor: TensorAxis,
) -> tuple[Float[Array, "T E"], Float[Array, "L P elems"]]:
    """One layer. Jitted, with the layer's number traced: L layers are traced and lowered once."""
    tokens = x.shape[0]
    static: Any = {"config": config, "backend": attention.backend}
    linear = partial(project, pool=pool, layer=layer, lora=lora, **static)

    z = rms_norm(x, weights.input_norm, config.rms_norm_eps)
    qkv = linear(weights.qkv, z, names=("q_proj", "k_proj", "v_proj"))
    attended, pool = attention(qkv, pool, layer, heads=config.num_attention_heads)
    linear = partial(linear, pool=pool)
    x = x + tensor.sum(linear(weights.o, attended.reshape(tokens, -1), names=("o_proj",)))

    z = rms_norm(x, weights.post_attention_norm, config.rms_norm_eps)
    names = "gate_proj", "up_proj"
    if lora is None or lora.adapted.isdisjoint(names):
        hidden = weights.gate_up.gated(z, attention.backend)
    else:
        hidden = silu_gated(linear(weights.gate_up, z, names=names))
    x = x + tensor.sum(linear(weights.down, hidden, names=("down_proj",)))
    return x, pool


def embed(
    weights: LlamaWeights,
    tokens: Int[Array, " T"],
    pool: Float[Array, "L P elems"],
    lora: Lora | None,
    config: ModelConfig,
    tensor: TensorAxis,
) -> Float[Array, "T E"]:
    """Token embeddings; `lora` where some adapter of the step adapts `embed_tokens`."""
    tokens = tokens - tensor.index * config.vocab_size
    held = (tokens >= 0) & (tokens < config.vocab_size)
    tokens = jnp.clip(tokens, 0, config.vocab_size - 1)
    x = weights.embed_tokens.at[tokens].get(mode="promise_in_bounds")
    if tensor.size > 1:
        x = jnp.where(held[:, None], x, 0)
    if lora is not None:
        modules = _outer("embed_tokens", config)
        x = lora.how.embedding(tokens, held, x, pool, lora.adapters, modules)
    return tensor.sum(x)


def head(
    weights: LlamaWeights,
    hidden: Float[Array, "n E"],
    pool: Float[Array, "L P elems"],
    lora: Lora | None,
    config: ModelConfig,
    backend: Backend,
    tensor: TensorAxis,
    vocab_size: int,
) -> Float[Array, "n V"]:
    """Logits in float32; `lora` where some adapter of the step adapts `lm_head`.

    `vocab_size` is V, of the whole model.
    """
    lm_head = weights.lm_head or Linear(weights.embed_tokens)
    logits = lm_head(hidden, backend)
    if lora is not None:
        modules = _outer("lm_head", config)
        logits = lora.how.column_parallel(hidden, logits, pool, None, lora.adapters, modules)
    return tensor.gather_columns(logits)[:, :vocab_size].astype(jnp.float32)


def forward(
    weights: LlamaWeights,
    pool: Float[Array, "L P elems"],
    page_table: Int[Array, "slots N"],
    tokens: Int[Array, " T"],
    inputs: StepInputs,
    lora: Lora | None,
    *,
    config: ModelConfig,
    layout: PageLayout,
    decode: bool,
    lora_mode: LoraMode,
    backend: Backend,
    tensor: TensorAxis,
) -> tuple[Float[Array, "T E"], Float[Array, "L P elems"]]:
    """The final hidden states of a step's tokens, and the pool with their keys and values."""
    rows = page_table.at[inputs.slot].get(mode="clip")
    column = (inputs.positions // layout.page_size)[:, None]
    own = rows.at[inputs.row].get(mode="clip")
    page = jnp.take_along_axis(own, column, axis=1, mode="clip")[:, 0]
    cos, sin = rotation(inputs.positions, config)
    attention = Attention(
        inputs=inputs,
        page_table=rows,
        page=jnp.where(inputs.row < rows.shape[0], page, pool.shape[1]),  # padding writes nothing
        offset=inputs.positions % layout.page_size,
        cos=cos,
        sin=sin,
        layout=layout,
        decode=decode,
        backend=backend,
    )
    x = embed(weights, tokens, pool, lora if lora_mode == "all" else None, config, tensor)
    for number, layer in enumerate(weights.layers):
        x, pool = decoder_layer(x, pool, jnp.int32(number), layer, attention, lora, config, tensor)
    return rms_norm(x, weights.norm, config.rms_norm_eps), pool


def _outer(name: str, config: ModelConfig) -> Modules:
    inputs, outputs = config.projection_shape(name)
    return Modules(OUTER_MODULES.index(name), inputs, (outputs,))
