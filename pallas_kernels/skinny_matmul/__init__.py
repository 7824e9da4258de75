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
    backend: Backend = "xla",
) -> Float[Array, "T O"]:
    """`y = x Wᵀ`, made for steps of 1 to 128 tokens.

    Args:
        weight: W as Hugging Face stores it, in x's dtype.

    Returns:
        In x's dtype: summed in float32, rounded once. The same every time, bit for bit.
    """
    implementation = mosaic if backend == "mosaic" else reference
    return implementation.skinny_matmul(x, weight)
