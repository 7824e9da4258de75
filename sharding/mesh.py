# SPDX-License-Identifier: Apache-2.0
"""The devices of one copy of the model, and where arrays lie on them."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from sharding.specs import REPLICATED, TENSOR, sharded_axis


def tensor_mesh(size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, `TENSOR`, over the first devices.

    Every process of a `jax.distributed` cluster sees the devices of all, in the same order. A data
    axis would come before this one: neighbours talk most.

    Raises:
        ValueError: there are fewer devices, or a process would have none in the mesh.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < size:
        each = Counter(device.process_index for device in devices)
        found = ", ".join(f"{n} in process {process}" for process, n in sorted(each.items()))
        where = f" ({found})" if len(each) > 1 else ""
        raise ValueError(
            f"tensor_parallel_size is {size}, but JAX sees {len(devices)} devices{where}: lower "
            "it, or give more devices"
        )
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:size]}
    if idle:
        raise ValueError(
            f"tensor_parallel_size is {size}, but {len(devices)} devices of "
            f"{jax.process_count()} processes take part: set it to {len(devices)}"
        )
    if size > 1:
        # By default NCCL connects GPUs when a message of a new kind first needs it, which waits for
        # what runs on them. XLA's all-reduces do, for each other. A benchmark on two H200s hung
        # once, when sizes changed; this is the likely reason. Now all is connected at the start.
        os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
    return Mesh(np.asarray(devices[:size]), (TENSOR,), axis_types=(AxisType.Auto,))


@dataclass(frozen=True, slots=True)
class Placement:
    """Puts arrays on a mesh. Every process puts what its own devices hold."""

    mesh: Mesh

    @property
    def size(self) -> int:
        """Devices of the tensor axis."""
        return self.mesh.shape[TENSOR]

    @property
    def own(self) -> tuple[int, ...]:
        """Places on the tensor axis of this process's devices."""
        process = jax.process_index()
        devices = self.mesh.devices.flat
        return tuple(n for n, device in enumerate(devices) if device.process_index == process)

    def sharding(self, spec: PartitionSpec = REPLICATED, memory_kind: str = "device") -> Sharding:
        """Where an array lies. On one device it is what jitted functions return too."""
        if self.size == 1:
            return SingleDeviceSharding(self.mesh.devices.item(), memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def put(
        self,
        block: Callable[[int], Shaped[np.ndarray, "..."]],
        shape: Sequence[int],
        spec: PartitionSpec,
        memory_kind: str = "device",
    ) -> Array:
        """An array of which every device has its own block.

        Args:
            block: gives a device's block, by its place on the tensor axis; device 0's for all
                if nothing is dealt out.
            shape: of a block.
            spec: says which axis the blocks lie along.
            memory_kind: as of JAX.
        """
        axis, sharding = sharded_axis(spec), self.sharding(spec, memory_kind)

        def of(index: Any) -> np.ndarray:
            return block(0 if axis is None else (index[axis].start or 0) // shape[axis])

        # Unlike device_put, this does not send arrays to the other processes to compare them.
        return jax.make_array_from_callback(self.whole(shape, spec), sharding, of)

    def move(self, arrays: Sequence[Array], spec: PartitionSpec) -> tuple[Array, ...]:
        """Starts to copy arrays to the devices, from memory of the host by their sides."""
        to = self.sharding(spec)
        if self.size == 1:
            return tuple(jax.device_put(list(arrays), to))
        # Shard by shard: then it is no matter of other processes.
        shards = [shard for array in arrays for shard in array.addressable_shards]
        homes = [SingleDeviceSharding(shard.device, memory_kind="device") for shard in shards]
        moved = iter(jax.device_put([shard.data for shard in shards], homes))
        return tuple(
            jax.make_array_from_single_device_arrays(
                array.shape, to, [next(moved) for _ in array.addressable_shards]
            )
            for array in arrays
        )

    def whole(self, shape: Sequence[int], spec: PartitionSpec) -> tuple[int, ...]:
        """The shape of an array whose blocks have this shape."""
        axis = sharded_axis(spec)
        return tuple(n * self.size if a == axis else n for a, n in enumerate(shape))

    def shape(
        self, shape: Sequence[int], spec: PartitionSpec, dtype: DTypeLike
    ) -> jax.ShapeDtypeStruct:
        """What `put` gives, without its memory."""
        whole = self.whole(shape, spec)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=self.sharding(spec))

    def least(self, value: int) -> int:
        """The least of the processes' values, which they all get; each calls this once."""
        if jax.process_count() == 1:
            return value
        return int(multihost_utils.process_allgather(np.int64(value)).min())
