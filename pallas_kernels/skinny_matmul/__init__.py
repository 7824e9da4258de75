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
    then: Float[Array, "next_O next_I"] | None = None,
    backend: Backend = "xla",
) -> Float[Array, "T O"]:
    """`y = x Wᵀ`, made for steps of 1 to 128 tokens.

    Args:
        weight: W as Hugging Face stores it, in x's dtype.
        then: the weight that is read next. No result depends on it; memory that idles when W is
            read may fetch the beginning of it.

    Returns:
        In x's dtype: summed in float32, rounded once. The same every time, bit for bit.
    """
    if backend == "mosaic":
        return mosaic.skinny_matmul(x, weight, then=then)
    return reference.skinny_matmul(x, weight)
