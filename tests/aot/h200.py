# SPDX-License-Identifier: Apache-2.0
"""Compiles for an H200 on a machine without one, down to machine code.

Good for asserting what the compiler made of a program: what is aliased, how large its temporaries
are. Not for speed: nothing is autotuned without a card. Needs the wheels of the `aot` group.
"""

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

# A GpuTargetConfig in text form, from NVIDIA's data sheet of the H200 SXM.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 23 }
device_description_str: "NVIDIA H200"
"""


def compile_for_h200(jitted, *args, **statics) -> jax.stages.Compiled:
    """The executable of a jitted function for one H200; never run.

    Args:
        jitted: what `jax.jit` returned.
        *args: pytrees of anything with a shape and a dtype.
        **statics: static arguments.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
    )
    mesh = Mesh(np.array(topology.devices), ("device",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    abstract = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(abstract):
        return jitted.trace(*shapes, **statics).lower().compile()
