# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the engine's programs for an H200, without one."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from slora_jax.engine import programs
from tests.aot.h200 import compile_for_h200
from tests.engine.shapes import LLAMA_2_7B_4_LAYERS, step_shapes

PAGES = 8192  # 8 GiB: 4 layers of 256 KiB pages

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the wheels of the aot group: uv run --group aot pytest -m aot",
    ),
]


@pytest.mark.parametrize("tokens", [16, 128], ids=["decode", "mixed"])
@pytest.mark.parametrize("lora_mode", ["none", "all"])
def test_step_aliases_the_pool(tokens, lora_mode):
    args, shape = step_shapes(
        LLAMA_2_7B_4_LAYERS,
        pages=PAGES,
        rows=16,
        tokens=tokens,
        lora_mode=lora_mode,
        dtype=jnp.bfloat16,
    )
    memory = compile_for_h200(programs.model_step, *args, shape=shape).memory_analysis()
    pool = args[1].size * args[1].dtype.itemsize
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8


def test_install_aliases_the_pool():
    (_, pool, *_), _ = step_shapes(
        LLAMA_2_7B_4_LAYERS,
        pages=PAGES,
        rows=16,
        tokens=16,
        lora_mode="none",
        dtype=jnp.bfloat16,
    )
    pages = jax.ShapeDtypeStruct((8,), jnp.int32)
    contents = jax.ShapeDtypeStruct((8, *pool.shape[::2]), pool.dtype)
    memory = compile_for_h200(programs.install_pages, pool, pages, contents).memory_analysis()
    size = pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // 8
