# SPDX-License-Identifier: Apache-2.0
"""A Llama over the page pool: pure functions of weights, pool and step inputs.

LoRA is added to each projection's output, never merged into its weight, by kernels that read the
adapters' matrices from the pool.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    Adapters,
    Modules,
    PageLayout,
    lora_delta,
    lora_expand,
    lora_lookup,
    paged_decode,
    paged_prefill,
    rope_kv_write,
)
from pallas_kernels.backend import Backend
from pallas_kernels.segments import with_work
from slora_jax.config import LAYER_MODULES, OUTER_MODULES, ModelConfig
from slora_jax.model.inputs import StepInputs
from slora_jax.model.rope import rotation
from slora_jax.model.weights import LayerWeights, Linear, LlamaWeights

LoraMode = Literal["none", "layers", "all"]  # "all": some adapter has embed_tokens or lm_head too


@struct.dataclass
class LoraTables:
    """Where every resident adapter lies; written when an adapter is installed.

    Line L of the layer axis holds the modules that belong to no layer, in the order of
    `OUTER_MODULES`.
    """

    pages: Int[Array, "A N"]
    rank: Int[Array, "A L+1 M"]
    first_tile: Int[Array, "A L+1 M"]
    scale: Float[Array, "A L+1 M"]


@struct.dataclass
class Lora:
    """The adapters of one step. Static: how the kernels are to read them."""

    adapters: Adapters
    max_rank: int = struct.field(pytree_node=False)
    layout: PageLayout = struct.field(pytree_node=False)
    backend: Backend = struct.field(pytree_node=False)
    adapted: frozenset[str] = struct.field(pytree_node=False)  # modules that any adapter has

    @classmethod
    def of(
        cls,
        tables: LoraTables,
        slot: Int[Array, " G"],
        length: Int[Array, " G"],
        tokens: int,
        block: int,
        layout: PageLayout,
        **static: Any,
    ) -> "Lora":
        """Runs of `length` tokens, of `tokens` in all, on the adapters in slots `slot`."""
        lines = tables.pages[slot], tables.rank[slot], tables.first_tile[slot], tables.scale[slot]
        size = {"layout": layout, "tokens": tokens, "block": block}
        return cls(with_work(length, *lines, **size), layout=layout, **static)

    def over(self, length: Int[Array, " G"], tokens: int, block: int) -> "Lora":
        """The same adapters over other tokens."""
        old = self.adapters
        lines = old.pages, old.rank, old.first_tile, old.scale
        size = {"layout": self.layout, "tokens": tokens, "block": block}
        return replace(self, adapters=with_work(length, *lines, **size))

    @property
    def options(self) -> dict[str, Any]:
        """What every operation of LoRA is told."""
        return {"max_rank": self.max_rank, "layout": self.layout, "backend": self.backend}


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
    """The fused projection `names`, with each token's own adapter added."""
    y = linear(x, backend)
    if lora is None or lora.adapted.isdisjoint(names):
        return y
    outputs = tuple(config.projection_shape(name)[1] for name in names)
    modules = Modules(LAYER_MODULES.index(names[0]), x.shape[1], outputs)
    return lora_delta(x, y, pool, layer, lora.adapters, modules=modules, **lora.options)


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


@partial(jax.jit, static_argnames="config")
def decoder_layer(
    x: Float[Array, "T E"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    weights: LayerWeights,
    attention: Attention,
    lora: Lora | None,
    config: ModelConfig,
) -> tuple[Float[Array, "T E"], Float[Array, "L P elems"]]:
    """One layer. Jitted, with the layer's number traced: L layers are traced and lowered once."""
    tokens = x.shape[0]
    static: Any = {"config": config, "backend": attention.backend}
    linear = partial(project, pool=pool, layer=layer, lora=lora, **static)

    z = rms_norm(x, weights.input_norm, config.rms_norm_eps)
    qkv = linear(weights.qkv, z, names=("q_proj", "k_proj", "v_proj"))
    attended, pool = attention(qkv, pool, layer, heads=config.num_attention_heads)
    linear = partial(linear, pool=pool)
    x = x + linear(weights.o, attended.reshape(tokens, -1), names=("o_proj",))

    z = rms_norm(x, weights.post_attention_norm, config.rms_norm_eps)
    gate, up = jnp.split(linear(weights.gate_up, z, names=("gate_proj", "up_proj")), 2, axis=1)
    x = x + linear(weights.down, jax.nn.silu(gate) * up, names=("down_proj",))
    return x, pool


def embed(
    weights: LlamaWeights,
    tokens: Int[Array, " T"],
    pool: Float[Array, "L P elems"],
    lora: Lora | None,
    config: ModelConfig,
) -> Float[Array, "T E"]:
    """Token embeddings; `lora` where some adapter of the step adapts `embed_tokens`."""
    x = weights.embed_tokens.at[tokens].get(mode="clip")
    if lora is None:
        return x
    modules = _outer("embed_tokens", config)
    size = {"max_rank": lora.max_rank, "layout": lora.layout}
    h = lora_lookup(tokens, pool, lora.adapters, modules=modules, **size)
    return lora_expand(x, h, pool, None, lora.adapters, modules=modules, layout=lora.layout)


def head(
    weights: LlamaWeights,
    hidden: Float[Array, "n E"],
    pool: Float[Array, "L P elems"],
    lora: Lora | None,
    config: ModelConfig,
    backend: Backend,
) -> Float[Array, "n V"]:
    """Logits in float32; `lora` where some adapter of the step adapts `lm_head`."""
    lm_head = weights.lm_head or Linear(weights.embed_tokens)
    logits = lm_head(hidden, backend)
    if lora is not None:
        modules = _outer("lm_head", config)
        logits = lora_delta(
            hidden, logits, pool, None, lora.adapters, modules=modules, **lora.options
        )
    return logits.astype(jnp.float32)


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
    x = embed(weights, tokens, pool, lora if lora_mode == "all" else None, config)
    for number, layer in enumerate(weights.layers):
        x, pool = decoder_layer(x, pool, jnp.int32(number), layer, attention, lora, config)
    return rms_norm(x, weights.norm, config.rms_norm_eps), pool


def _outer(name: str, config: ModelConfig) -> Modules:
    inputs, outputs = config.projection_shape(name)
    return Modules(OUTER_MODULES.index(name), inputs, (outputs,))
