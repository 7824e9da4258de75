# SPDX-License-Identifier: Apache-2.0
"""The benchmark of several devices: its arithmetic, and that it runs on a CPU."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import tensor_parallel
from benchmarks.shapes import LLAMA_2_7B
from pallas_kernels.layout import PageLayout
from sharding import Placement, tensor_mesh
from slora_jax.config import EngineConfig
from slora_jax.engine.setup import Setup
from slora_jax.model.shards import ModelShards

ARGUMENTS = "--shape tiny --devices 1,2 --batch 2 --context 40 --ranks 8 --partitions no-comm,slora"


@pytest.mark.long
def test_rows(capsys):
    assert tensor_parallel.main(ARGUMENTS.split()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line["benchmark"] == "tensor_parallel"]
    found = [(r["devices"], r["partition"], r["rank"], r["silent"]) for r in rows]
    assert found == [
        (1, "no-comm", 0, False),
        (1, "no-comm", 8, False),
        *((2, "no-comm", rank, silent) for rank in (0, 8) for silent in (False, True)),
        *((2, "slora", 8, silent) for silent in (False, True)),
    ]
    for row in rows:
        assert row["adapters"] == (2 if row["rank"] else 0)
        assert row["step_ms"] > 0
        assert row["dispatch_ms"] > 0


def setup(devices: int, partition: str) -> Setup:
    model = ModelShards(LLAMA_2_7B, devices, partition)
    options = EngineConfig(dtype="bfloat16", tensor_parallel_size=devices)
    layout = PageLayout(32 // devices, 128, 16)
    return Setup(options, model, layout, Placement(tensor_mesh(devices)), "xla")


@pytest.mark.parametrize(("devices", "share"), [(1, 1.0), (2, 0.75), (4, 0.625), (8, 0.5625)])
def test_bytes_of_adapters_without_communication(devices, share):
    """What the design says that a device holds of an adapter on q, k, v and o."""
    row = tensor_parallel.Row(batch=64, context=320, rank=16)
    _, base = tensor_parallel._work(setup(devices, "no-comm"), row._replace(rank=0))
    _, adapted = tensor_parallel._work(setup(devices, "no-comm"), row)
    whole = 64 * 32 * 16 * 8 * 4096 * jnp.dtype(jnp.bfloat16).itemsize
    assert adapted.bytes - base.bytes == share * whole


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_bytes_of_adapters_as_published(devices):
    row = tensor_parallel.Row(batch=64, context=320, rank=16)
    _, base = tensor_parallel._work(setup(devices, "slora"), row._replace(rank=0))
    _, adapted = tensor_parallel._work(setup(devices, "slora"), row)
    whole = 64 * 32 * 16 * 8 * 4096 * 2
    assert adapted.bytes - base.bytes == whole / devices
