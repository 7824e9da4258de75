# SPDX-License-Identifier: Apache-2.0
"""One model on several devices: the mesh, who holds what, and the collectives of LoRA.

Imports `jax` and `pallas_kernels` only.

    mesh.py         the devices, and where arrays lie on them
    specs.py        the tables: how every weight, the pool and both layouts of LoRA are sharded
    split.py        how one axis is dealt out, if it does not divide
    collectives.py  what devices tell each other within a step
    lora.py         a LoRA projection under each partition
"""

from sharding.collectives import TensorAxis as TensorAxis
from sharding.mesh import Placement as Placement
from sharding.mesh import tensor_mesh as tensor_mesh
from sharding.specs import TENSOR as TENSOR
from sharding.specs import LoraPartition as LoraPartition
from sharding.split import Split as Split
