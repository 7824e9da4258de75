# SPDX-License-Identifier: Apache-2.0
"""LoRA beside a projection that is dealt out to the devices of the tensor axis.

Both partitions add what a device knows to its own y, before the base model's all-reduce where there
is one. Under "no-comm" that is all: the kernels of one GPU do it. Under "slora" (section 6) the two
halves of LoRA lie apart, with a collective between them, and so do the two halves of a module: with
M modules A is in column m of the tables, and B in column M + m.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import (
    Adapters,
    Modules,
    PageLayout,
    lora_delta,
    lora_expand,
    lora_lookup,
    lora_shrink,
)
from pallas_kernels.backend import Backend
from sharding.collectives import TensorAxis
from sharding.specs import LoraPartition


@dataclass(frozen=True, slots=True)
class ShardedLora:
    """How the operations of LoRA are to be done. Static.

    Attributes:
        max_rank: the largest rank that an adapter may have.
        layout: of the pool's pages.
        backend: of the operations.
        tensor: the devices.
        partition: how A and B are dealt out; means nothing on one device.
    """

    max_rank: int
    layout: PageLayout
    backend: Backend
    tensor: TensorAxis
    partition: LoraPartition

    @property
    def in_halves(self) -> bool:
        return self.partition == "slora" and self.tensor.size > 1

    def column_parallel(
        self,
        x: Float[Array, "T I"],
        y: Float[Array, "T O"],
        pool: Float[Array, "L P elems"],
        layer: Int[Array, ""] | None,
        adapters: Adapters,
        modules: Modules,
    ) -> Float[Array, "T O"]:
        """y with this device's outputs of the delta added; x is the same on all devices."""
        if not self.in_halves:
            return self._whole(x, y, pool, layer, adapters, modules)
        h = self._shrink(x, pool, layer, adapters, modules, self.tensor.most_ranks(self.max_rank))
        h = self.tensor.gather_ranks(h, self.max_rank)
        return self._expand(y, h, pool, layer, adapters, modules)

    def row_parallel(
        self,
        x: Float[Array, "T I"],
        y: Float[Array, "T E"],
        pool: Float[Array, "L P elems"],
        layer: Int[Array, ""] | None,
        adapters: Adapters,
        modules: Modules,
    ) -> Float[Array, "T E"]:
        """y, this device's part of a sum, with a part of the delta added; x are its inputs."""
        if not self.in_halves:
            return self._whole(x, y, pool, layer, adapters, modules)
        h = self._shrink(x, pool, layer, adapters, modules, self.max_rank)
        return self._expand_share(y, self.tensor.sum(h), pool, layer, adapters, modules)

    def embedding(
        self,
        tokens: Int[Array, " T"],
        held: Bool[Array, " T"],
        y: Float[Array, "T E"],
        pool: Float[Array, "L P elems"],
        adapters: Adapters,
        modules: Modules,
    ) -> Float[Array, "T E"]:
        """`row_parallel` for one-hot inputs.

        Args:
            tokens: places in this device's part of the vocabulary.
            held: whether a token is there at all.
        """
        size = {"max_rank": self.max_rank, "layout": self.layout}
        h = lora_lookup(tokens, pool, adapters, modules=modules, **size)
        h = jnp.where(held[:, None, None], h, 0)
        if self.in_halves:
            return self._expand_share(y, self.tensor.sum(h), pool, None, adapters, modules)
        return lora_expand(y, h, pool, None, adapters, modules=modules, layout=self.layout)

    def _whole(self, x, y, pool, layer, adapters, modules: Modules):
        options = {"max_rank": self.max_rank, "layout": self.layout, "backend": self.backend}
        return lora_delta(x, y, pool, layer, adapters, modules=modules, **options)

    def _shrink(self, x, pool, layer, adapters, modules: Modules, max_rank: int):
        a = replace(modules, outputs=(0,) * modules.count)
        options = {"max_rank": max_rank, "layout": self.layout, "backend": self.backend}
        return lora_shrink(x, pool, layer, adapters, modules=a, **options)

    def _expand(self, y, h, pool, layer, adapters, modules: Modules):
        first = adapters.rank.shape[2] // 2 + modules.first
        b = replace(modules, first=first, inputs=0)
        options = {"layout": self.layout, "backend": self.backend}
        return lora_expand(y, h, pool, layer, adapters, modules=b, **options)

    def _expand_share(self, y, h, pool, layer, adapters, modules: Modules):
        """Adds this device's outputs to its part of the sum; the all-reduce gathers them."""
        share = y.shape[1] // self.tensor.size
        start = self.tensor.index * share
        mine = jax.lax.dynamic_slice_in_dim(y, start, share, axis=1)
        modules = replace(modules, outputs=(share,))
        mine = self._expand(mine, h, pool, layer, adapters, modules)
        return jax.lax.dynamic_update_slice_in_dim(y, mine, start, axis=1)
