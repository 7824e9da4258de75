# SPDX-License-Identifier: Apache-2.0
"""How one axis of a weight is dealt out to devices."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from pallas_kernels.layout import ceil_div, round_up


@dataclass(frozen=True, slots=True)
class Split:
    """Every device holds a block of the axis; what lies past the axis's end is zeros.

    Attributes:
        size: of the axis.
        width: of every device's block.
        starts: the first place of each device's block, ascending. Blocks may hold the same.
    """

    size: int
    width: int
    starts: tuple[int, ...]

    @classmethod
    def padded(cls, size: int, devices: int, multiple: int = 1) -> "Split":
        """Blocks one after another, as wide as needed and a multiple of something."""
        width = round_up(ceil_div(size, devices), multiple)
        return cls(size, width, tuple(width * n for n in range(devices)))

    @classmethod
    def heads(cls, heads: int, head_dim: int, devices: int) -> "Split":
        """Whole heads. Where there are fewer than devices, each is held by several.

        Raises:
            ValueError: neither number divides the other.
        """
        if heads % devices and devices % heads:
            raise ValueError(f"{heads} heads and {devices} devices: neither divides the other")
        starts = tuple(n * heads // devices * head_dim for n in range(devices))
        return cls(heads * head_dim, max(heads // devices, 1) * head_dim, starts)

    @classmethod
    def once(cls, size: int, devices: int) -> "Split":
        """The first device has the whole axis, the others zeros: their sum is right."""
        return cls(size, size, (0,) + (size,) * (devices - 1))

    def block(self, device: int) -> slice:
        """What a device holds of the axis; shorter than `width` where the rest is padding."""
        start = min(self.starts[device], self.size)
        return slice(start, min(start + self.width, self.size))

    def pad(self, block: Shaped[np.ndarray, "..."], axis: int) -> Shaped[np.ndarray, "..."]:
        """A device's block of an array, filled up with zeros."""
        missing = self.width - block.shape[axis]
        if not missing:
            return block
        widths = [(0, missing if a == axis else 0) for a in range(block.ndim)]
        return np.pad(block, widths)

    def take(
        self, array: Shaped[np.ndarray, "..."], device: int, axis: int
    ) -> Shaped[np.ndarray, "..."]:
        """A device's block of a whole array."""
        index = (slice(None),) * (axis % array.ndim) + (self.block(device),)
        return self.pad(array[index], axis % array.ndim)
