# SPDX-License-Identifier: Apache-2.0
"""LoRA whole: inputs to ranks to outputs, added to the base model's."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import Adapters, Modules


def lora_delta(
    x: Float[Array, "T I"],
    y: Float[Array, "T O"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""] | None,
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "T O"]:
    """`y + s · (x Aᵀ) Bᵀ`, each token with its own adapter's A, B and scale s.

    What `lora_expand` of `lora_shrink` gives; for single tokens (`adapters.block` 1) in one launch,
    h not going to memory.

    Args:
        x: the projection's input.
        y: the base model's output, modules side by side.
        layer: in `[0, L)`; None for `lm_head`, whose tiles are spread over all layers.
        max_rank: R, the largest rank that `adapters` may hold.

    Returns:
        In y's dtype, rounded once. Tokens of the base model keep y bit for bit.
    """
    return implementation(__name__, backend).lora_delta(
        x, y, pool, layer, adapters, modules=modules, max_rank=max_rank, layout=layout
    )
