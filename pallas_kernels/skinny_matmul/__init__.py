# SPDX-License-Identifier: Apache-2.0
"""A projection of few tokens: its time is that of reading the weights once."""

from jaxtyping import Array, Float

from pallas_kernels.backend import Backend
from pallas_kernels.skinny_matmul import mosaic, reference

FEW_TOKENS = mosaic.MOST_TOKENS


def skinny_matmul(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    *,
    gated: bool = False,
    whole: bool = False,
    backend: Backend = "xla",
) -> Float[Array, "T O//{1+gated}"]:
    """`y = x Wᵀ`, made for steps of 1 to 128 tokens.

    Args:
        weight: W as Hugging Face stores it, in x's dtype.
        gated: W is a gate above an equal number of other outputs, as Llama's `gate_up`, and what is
            wanted is `silu(gate) * up`, half as wide.
        whole: each sum is added up over all inputs in their order, as where `gated`: y is, bit for
            bit, what is gated there.

    Returns:
        In x's dtype: summed in float32, rounded once; `silu(gate) * up`, of the rounded sums, once
        more. The same every time, bit for bit.
    """
    implementation = mosaic if backend == "mosaic" else reference
    return implementation.skinny_matmul(x, weight, gated=gated, whole=whole)


def silu_gated(y: Float[Array, "T O"]) -> Float[Array, "T O//2"]:
    """`silu(gate) * up` of the halves of y, in float32 and rounded once, as in one kernel.

    In y's own dtype XLA would round after each of SiLU's four operations, where the GPU has
    bfloat16 arithmetic: a token would get other numbers in a step in which others' gates are
    adapted than in one without.
    """
    return reference.silu_gated(y)
