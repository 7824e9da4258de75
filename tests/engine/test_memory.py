# SPDX-License-Identifier: Apache-2.0
"""The compiled programs update the pool where it lies: no copy of it, no temporary of its size."""

import jax
import jax.numpy as jnp
import pytest

from slora_jax.engine import programs
from tests.engine.shapes import TINY, step_shapes

PAGES = 4096  # 64 MB: far more than anything else in the step


@pytest.mark.parametrize("tokens", [4, 32], ids=["decode", "mixed"])
@pytest.mark.parametrize("lora_mode", ["none", "all"])
def test_step_on_cpu(tokens, lora_mode):
    args, shape = step_shapes(
        TINY, pages=PAGES, rows=4, tokens=tokens, lora_mode=lora_mode, dtype=jnp.float32
    )
    memory = programs.model_step.trace(*args, shape=shape).lower().compile().memory_analysis()
    pool = args[1].size * args[1].dtype.itemsize
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8


@pytest.mark.parametrize("partition", ["no-comm", pytest.param("slora", marks=pytest.mark.long)])
def test_step_on_two_devices(partition):
    """Each device updates its own part of the pool where it lies."""
    args, shape = step_shapes(
        TINY, pages=PAGES, rows=4, tokens=4, lora_mode="all", dtype=jnp.float32,
        devices=2, partition=partition,
    )  # fmt: skip
    memory = programs.model_step.trace(*args, shape=shape).lower().compile().memory_analysis()
    part = args[1].size * args[1].dtype.itemsize // 2
    assert memory.alias_size_in_bytes >= part
    assert memory.temp_size_in_bytes < part // 8


def test_install_on_cpu():
    (_, pool, *_), shape = step_shapes(
        TINY, pages=PAGES, rows=4, tokens=4, lora_mode="none", dtype=jnp.float32
    )
    pages = jax.ShapeDtypeStruct((8,), jnp.int32)
    contents = jax.ShapeDtypeStruct((8, *pool.shape[::2]), pool.dtype)
    traced = programs.install_pages.trace(pool, pages, contents, mesh=shape.mesh)
    memory = traced.lower().compile().memory_analysis()
    size = pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // 8
