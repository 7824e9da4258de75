# SPDX-License-Identifier: Apache-2.0
"""Compiles for an H200 on a machine without one, down to machine code.

Good for asserting what the compiler made of a program: what is aliased, how large its temporaries
are. Not for speed: nothing is autotuned without a card. Needs the wheels of the `aot` group.
"""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
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

NEEDS_WHEELS = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
        reason="needs the wheels of the aot group: uv run --group aot pytest tests/aot",
    ),
]
needs_jax_triton = pytest.mark.skipif(
    not importlib.util.find_spec("jax_triton"), reason="needs jax-triton, of the aot group, too"
)
# A GpuTargetConfig in text form, as XLA describes an H200 that it finds.
TARGET = Path(__file__).with_name("h200_target.txt").read_text()


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


def two_h200s() -> Mesh:
    """A mesh of two, for `tensor_mesh`'s place."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x2x1", target_config=TARGET
    )
    return Mesh(np.array(topology.devices), ("tensor",), axis_types=(AxisType.Auto,))


def compile_for_two(jitted, *args, shape, **statics) -> jax.stages.Compiled:
    """The executable of a step, whose arguments say where they lie, for two H200s; never run."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    abstract = AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(abstract):
        shape = replace(shape, mesh=abstract)  # `shard_map` wants the very same
        return jitted.trace(*args, shape=shape, **statics).lower().compile()


def kernels_in(compiled: jax.stages.Compiled) -> list[str]:
    """The Mosaic kernels that an executable calls, one line of HLO each."""
    return re.findall(r".* custom-call\(.*mosaic_gpu.*", compiled.as_text())


def triton_kernels_in(compiled: jax.stages.Compiled) -> list[str]:
    """The same of Triton."""
    return re.findall(r".* custom-call\(.*triton_kernel_call.*", compiled.as_text())


def spilled(output: str) -> dict[str, int]:
    """Bytes of registers that spill, by kernel, from ptxas's output, which `capfd` captures.

    It reports (`MOSAIC_GPU_DUMP_PTXAS`) when it compiles: once a process for equal kernels.
    """
    report = r"entry function '(\w+)'(?:.|\n)*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(report, output)
    return {name: int(stores) + int(loads) for name, stores, loads in found}
