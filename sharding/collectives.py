# SPDX-License-Identifier: Apache-2.0
"""What the devices of the tensor axis tell each other within a step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import SLAB_RANKS, ceil_div
from sharding.specs import TENSOR


@dataclass(frozen=True, slots=True)
class TensorAxis:
    """The tensor axis as the code sees that runs on one device of it. Static.

    Attributes:
        size: devices; with 1 nothing is done, and there need be no mesh.
        silent: leave the collectives out, for benchmarks: shapes stay, results are wrong.
    """

    size: int = 1
    silent: bool = False

    @property
    def index(self) -> Int[Array, ""]:
        """This device's place on the axis."""
        return jax.lax.axis_index(TENSOR) if self.size > 1 else jnp.int32(0)

    def sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of all devices' x: one all-reduce."""
        return x if self.size == 1 or self.silent else jax.lax.psum(x, TENSOR)

    def gather_columns(self, x: Float[Array, "T O"]) -> Float[Array, "T O*devices"]:
        """All devices' columns side by side: one all-gather."""
        if self.size == 1:
            return x
        if self.silent:
            return jnp.tile(x, (1, self.size))
        return jax.lax.all_gather(x, TENSOR, axis=1, tiled=True)

    def gather_ranks(self, h: Float[Array, "T M R"], max_rank: int) -> Float[Array, "T M R"]:
        """All ranks of h, of which each device has those of its own slabs: one all-gather.

        Slab s is on device `s % size`, so that all ranks come into their order by a transposition,
        whatever the ranks of the adapters are. S-LoRA needed a kernel to put them together.
        """
        if self.size == 1:
            return h
        tokens, modules, ranks = h.shape
        slabs = h.reshape(tokens, modules, ranks // SLAB_RANKS, SLAB_RANKS)
        if self.silent:
            every = jnp.broadcast_to(slabs, (self.size, *slabs.shape))
        else:
            every = jax.lax.all_gather(slabs, TENSOR)
        every = every.transpose(1, 2, 3, 0, 4)  # [T, M, slabs of a device, device, 8]
        return every.reshape(tokens, modules, -1)[:, :, :max_rank]

    def rank_share(self, rank: Int[Array, "..."]) -> Int[Array, "..."]:
        """Ranks that this device holds of so many: its slabs', the last one's padding included."""
        slabs = ceil_div(rank, SLAB_RANKS)
        return jnp.maximum(ceil_div(slabs - self.index, self.size), 0) * SLAB_RANKS

    def most_ranks(self, max_rank: int) -> int:
        """Ranks that a device holds of `max_rank` at most."""
        return ceil_div(ceil_div(max_rank, SLAB_RANKS), self.size) * SLAB_RANKS
