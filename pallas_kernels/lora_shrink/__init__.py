# SPDX-License-Identifier: Apache-2.0
"""The first half of LoRA: inputs to ranks."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import Adapters, Modules


def lora_shrink(
    x: Float[Array, "T I"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""] | None,
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "T M R"]:
    """`h = x Aᵀ` of each token with its own adapter's A, for M modules that share their input.

    (S-LoRA section 5.3, MBGMM and MBGMV in one: segments of one token are the gather form.)
    For where h crosses devices before it is expanded; `lora_delta` is the fast way through both
    halves on one.

    Args:
        modules: may have A alone in their sections; what their outputs are does not matter.
        layer: in `[0, L)`; None for `lm_head`, whose tiles are spread over all layers.
        max_rank: R, the largest rank that `adapters` may hold.

    Returns:
        float32. Zero past a module's rank and for tokens of the base model.
    """
    return implementation(__name__, backend).lora_shrink(
        x, pool, layer, adapters, modules=modules, max_rank=max_rank, layout=layout
    )
