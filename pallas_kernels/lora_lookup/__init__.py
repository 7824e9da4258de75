# SPDX-License-Identifier: Apache-2.0
"""The first half of an embedding's LoRA: a token's column of A."""

from jaxtyping import Array, Float, Int

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_lookup import reference
from pallas_kernels.segments import Adapters, Modules


def lora_lookup(
    tokens: Int[Array, " T"],
    pool: Float[Array, "L P elems"],
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
) -> Float[Array, "T M R"]:
    """`h = A[:, token]` of each token with its own adapter's A `[R, V]` (`lora_embedding_A`).

    It is `lora_shrink` of one-hot inputs with `layer=None`, reading one column instead of all. One
    gather of a few elements a token: XLA's is the only implementation.

    Args:
        tokens: in `[0, V)`.
        modules: one, the embedding; its inputs are the vocabulary, V.

    Returns:
        float32. Zero past the rank and for tokens of the base model.
    """
    return reference.lora_lookup(
        tokens, pool, adapters, modules=modules, max_rank=max_rank, layout=layout
    )
