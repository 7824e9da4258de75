# SPDX-License-Identifier: Apache-2.0
"""The second half of LoRA: ranks to outputs, added to the base model's."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, implementation
from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import Adapters, Modules


def lora_expand(
    y: Float[Array, "T O"],
    h: Float[Array, "T M R"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""] | None,
    adapters: Adapters,
    *,
    modules: Modules,
    layout: PageLayout,
    backend: Backend = "xla",
) -> Float[Array, "T O"]:
    """`y + s · h Bᵀ`, each token with its own adapter's B and scale s.

    For where h has crossed devices, or was looked up; `lora_delta` is the fast way through both
    halves on one.

    Args:
        y: the base model's output, modules side by side.
        h: from `lora_shrink` or `lora_lookup`, float32; not rounded before the sum is done.
        layer: as in `lora_shrink`.
        modules: with `inputs` 0 where they have B alone in their sections; else B follows A.

    Returns:
        In y's dtype, rounded once. Tokens of the base model keep y bit for bit.
    """
    return implementation(__name__, backend).lora_expand(
        y, h, pool, layer, adapters, modules=modules, layout=layout
    )
