# SPDX-License-Identifier: Apache-2.0
"""The first half of an embedding's LoRA: a token's column of A."""

from jaxtyping import Array, Float, Int

from pallas_kernels.layout import PageLayout
from pallas_kernels.lora_lookup import reference
from pallas_kernels.segments import ModuleTable, Segments


def lora_lookup(
    tokens: Int[Array, " T"],
    pool: Float[Array, "L P elems"],
    segments: Segments,
    table: ModuleTable,
    *,
    vocab: int,
    max_rank: int,
    layout: PageLayout,
) -> Float[Array, "T M R"]:
    """`h = A[:, token]` of each token with its own adapter's A `[R, V]` (`lora_embedding_A`).

    It is `lora_shrink` of one-hot inputs with `layer=None`, reading one column instead of all.

    Args:
        tokens: in `[0, V)`.
        table: M = 1, the embedding.
        vocab: V, the columns of A.

    Returns:
        float32. Zero past the rank and for tokens of the base model.
    """
    return reference.lora_lookup(
        tokens, pool, segments, table, vocab=vocab, max_rank=max_rank, layout=layout
    )
