# SPDX-License-Identifier: Apache-2.0
"""A dense Llama forward pass for training, with optional unmerged LoRA.

Parameters are a flat dict from Hugging Face tensor name to array, in Hugging Face orientation
([out, in]), so that a checkpoint is the pytree itself. LoRA weights are a dict from module name
(`model.layers.0.self_attn.q_proj`) to an `(A, B)` pair.

Axes: T tokens, B sequences, E embed, F ffn, H q heads, K kv heads, D head_dim, L layers, V vocab,
R rank.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Params = dict[str, jax.Array]
LoraParams = dict[str, tuple[jax.Array, jax.Array]]
LoraScales = Mapping[str, float]
# Applies the named module to activations.
Projection = Callable[[str, jax.Array], jax.Array]


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, under Hugging Face's field names."""

    vocab_size: int = 260
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 256

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """The [out, in] shape of every linear module inside the layers, by module name."""
        q_dim = self.num_attention_heads * self.head_dim
        kv_dim = self.num_key_value_heads * self.head_dim
        embed, ffn = self.hidden_size, self.intermediate_size
        in_layer = {
            "self_attn.q_proj": (q_dim, embed),
            "self_attn.k_proj": (kv_dim, embed),
            "self_attn.v_proj": (kv_dim, embed),
            "self_attn.o_proj": (embed, q_dim),
            "mlp.gate_proj": (ffn, embed),
            "mlp.up_proj": (ffn, embed),
            "mlp.down_proj": (embed, ffn),
        }
        return {
            f"model.layers.{layer}.{module}": shape
            for layer in range(self.num_hidden_layers)
            for module, shape in in_layer.items()
        }


def init_params(key: jax.Array, config: LlamaConfig) -> Params:
    """Random float32 weights; matrices that write to the residual stream start smaller."""
    embed = config.hidden_size
    matrices = {
        "model.embed_tokens.weight": (config.vocab_size, embed),
        "lm_head.weight": (config.vocab_size, embed),
        **{f"{name}.weight": shape for name, shape in config.projection_shapes().items()},
    }
    residual_scale = (2 * config.num_hidden_layers) ** -0.5
    params = {}
    for name, matrix_key in zip(matrices, jax.random.split(key, len(matrices)), strict=True):
        scale = 0.1 if "embed_tokens" in name else matrices[name][1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= residual_scale
        params[name] = scale * jax.random.normal(matrix_key, matrices[name])
    for layer in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            params[f"model.layers.{layer}.{norm}.weight"] = jnp.ones(embed)
    params["model.norm.weight"] = jnp.ones(embed)
    return params


def _rms_norm(x_BTE: jax.Array, weight_E: jax.Array, eps: float) -> jax.Array:
    x_f32 = x_BTE.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + eps)
    return weight_E * normed.astype(x_BTE.dtype)


def _rope(x_BTND: jax.Array, theta: float) -> jax.Array:
    """Rotates queries or keys ([B, T, heads, D]) by position, in the rotate-half convention."""
    head_dim = x_BTND.shape[-1]
    inverse_frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_TD = jnp.outer(jnp.arange(x_BTND.shape[1], dtype=jnp.float32), inverse_frequency)
    cos, sin = jnp.cos(angle_TD)[:, None], jnp.sin(angle_TD)[:, None]
    first, second = jnp.split(x_BTND.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTND.dtype)


def _linear(
    params: Params, lora: LoraParams, lora_scales: LoraScales, module: str, x: jax.Array
) -> jax.Array:
    """Applies a projection to [..., in]; the LoRA delta stays in float32 until it is added."""
    y = x @ params[f"{module}.weight"].T
    if module not in lora:
        return y
    lora_a, lora_b = (weight.astype(jnp.float32) for weight in lora[module])
    delta = (x.astype(jnp.float32) @ lora_a.T) @ lora_b.T
    return (y.astype(jnp.float32) + lora_scales[module] * delta).astype(y.dtype)


def _attention(linear: Projection, x_BTE: jax.Array, module: str, config: LlamaConfig) -> jax.Array:
    """Causal grouped-query self-attention; `linear(name, x)` applies a projection."""
    sequences, tokens, _ = x_BTE.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    split = (sequences, tokens, -1, config.head_dim)
    q_BTHD = _rope(linear(f"{module}.q_proj", x_BTE).reshape(split), config.rope_theta)
    k_BTKD = _rope(linear(f"{module}.k_proj", x_BTE).reshape(split), config.rope_theta)
    v_BTKD = linear(f"{module}.v_proj", x_BTE).reshape(split)
    k_BTHD, v_BTHD = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BTKD, v_BTKD))
    scores = (
        jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD, preferred_element_type=jnp.float32)
        * config.head_dim**-0.5
    )
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x_BTE.dtype)
    out_BTHD = jnp.einsum("bhts,bshd->bthd", weights, v_BTHD)
    return linear(f"{module}.o_proj", out_BTHD.reshape(sequences, tokens, -1))


def _mlp(linear: Projection, x_BTE: jax.Array, module: str) -> jax.Array:
    """The gated feed-forward network (SwiGLU)."""
    gate_BTF = jax.nn.silu(linear(f"{module}.gate_proj", x_BTE))
    return linear(f"{module}.down_proj", gate_BTF * linear(f"{module}.up_proj", x_BTE))


def forward(
    params: Params,
    token_ids_BT: jax.Array,
    config: LlamaConfig,
    lora: LoraParams | None = None,
    lora_scales: LoraScales | None = None,
) -> jax.Array:
    """Causal language-model logits.

    Activations take the dtype of `params`, so bfloat16 weights give a bfloat16 forward pass.

    Args:
        params: base weights.
        token_ids_BT: right-padded token ids; causality keeps padding from reaching real tokens.
        config: architecture.
        lora: `(A [R, in], B [out, R])` per adapted module, or None.
        lora_scales: multiplier of each adapted module's delta.

    Returns:
        Float32 logits, [B, T, V].
    """
    linear = functools.partial(_linear, params, lora or {}, lora_scales or {})

    def norm(module: str, x_BTE: jax.Array) -> jax.Array:
        return _rms_norm(x_BTE, params[f"{module}.weight"], config.rms_norm_eps)

    hidden_BTE = params["model.embed_tokens.weight"][token_ids_BT]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        x_BTE = norm(f"{layer}.input_layernorm", hidden_BTE)
        hidden_BTE += _attention(linear, x_BTE, f"{layer}.self_attn", config)
        x_BTE = norm(f"{layer}.post_attention_layernorm", hidden_BTE)
        hidden_BTE += _mlp(linear, x_BTE, f"{layer}.mlp")
    return linear("lm_head", norm("model.norm", hidden_BTE)).astype(jnp.float32)
