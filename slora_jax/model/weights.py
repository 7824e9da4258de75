# SPDX-License-Identifier: Apache-2.0
"""The weights of a Llama as a pytree."""

import jax
from flax import struct
from jaxtyping import Array, Float

from pallas_kernels import FEW_TOKENS, silu_gated, skinny_matmul
from pallas_kernels.backend import Backend


@struct.dataclass
class Linear:
    """`y = x Wᵀ + b`. `scale` is for a quantised base, and None otherwise."""

    weight: Float[Array, "O I"]
    bias: Float[Array, " O"] | None = None
    scale: Float[Array, " O"] | None = None

    def __call__(
        self, x: Float[Array, "T I"], backend: Backend = "xla", *, whole: bool = False
    ) -> Float[Array, "T O"]:
        """`whole`: with the sums that `gated` has, bit for bit, see `skinny_matmul`."""
        if x.shape[0] <= FEW_TOKENS:
            y = skinny_matmul(x, self.weight, whole=whole, backend=backend)
        else:
            y = jax.lax.dot_general(x, self.weight, (((1,), (1,)), ((), ())))
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias

    def gated(self, x: Float[Array, "T I"], backend: Backend = "xla") -> Float[Array, "T O//2"]:
        """`silu(gate) * up` of the two halves of y; of few tokens in one kernel."""
        if x.shape[0] <= FEW_TOKENS and self.scale is None and self.bias is None:
            return skinny_matmul(x, self.weight, gated=True, backend=backend)
        return silu_gated(self(x, backend, whole=True))


@struct.dataclass
class LayerWeights:
    """One decoder layer. `qkv` and `gate_up` are fused, interleaved per tensor-parallel shard."""

    input_norm: Float[Array, " E"]
    qkv: Linear
    o: Linear
    post_attention_norm: Float[Array, " E"]
    gate_up: Linear
    down: Linear


@struct.dataclass
class LlamaWeights:
    """A whole Llama. `lm_head` is None when it is tied to the embedding."""

    embed_tokens: Float[Array, "V E"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Array, " E"]
    lm_head: Linear | None
