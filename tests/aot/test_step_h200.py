# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the engine's programs for an H200, without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from slora_jax.engine import programs
from tests.aot.h200 import (
    NEEDS_WHEELS,
    compile_for_h200,
    compile_for_two,
    kernels_in,
    needs_jax_triton,
    spilled,
    triton_kernels_in,
    two_h200s,
)
from tests.engine.shapes import LLAMA_2_7B_4_LAYERS, step_shapes

PAGES = 8192  # 8 GiB: 4 layers of 256 KiB pages
ROWS, LAYERS = 16, LLAMA_2_7B_4_LAYERS.num_hidden_layers

pytestmark = NEEDS_WHEELS


def compiled_step(tokens, lora_mode, backend):
    """The executable and the bytes of its pool."""
    args, shape = step_shapes(
        LLAMA_2_7B_4_LAYERS,
        pages=PAGES,
        rows=ROWS,
        tokens=tokens,
        lora_mode=lora_mode,
        dtype=jnp.bfloat16,
        backend=backend,
    )
    compiled = compile_for_h200(programs.model_step, *args, shape=shape)
    return compiled, args[1].size * args[1].dtype.itemsize


@pytest.mark.parametrize("tokens", [ROWS, 128], ids=["decode", "mixed"])
@pytest.mark.parametrize("lora_mode", ["none", "all"])
def test_xla_step_aliases_the_pool(tokens, lora_mode):
    compiled, pool = compiled_step(tokens, lora_mode, "xla")
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8
    assert not kernels_in(compiled)


@pytest.mark.parametrize(
    ("tokens", "lora_mode", "of_layer", "of_head"),
    [
        # 4 projections, RoPE with the KV write, attention; LoRA of each projection. With prompts:
        # attention of those and of decodes, LoRA in two halves and of single tokens.
        (ROWS, "none", 6, 1),
        (ROWS, "layers", 6 + 4, 1),
        (ROWS, "all", 6 + 4, 2),
        (128, "none", 7, 1),
        (128, "all", 7 + 4 * 3, 2),
        (512, "all", 3 + 4 * 3, 2),  # projections of many tokens are XLA's
    ],
    ids=lambda value: str(value),
)
def test_mosaic_step(capfd, tokens, lora_mode, of_layer, of_head):
    """Its kernels, all of them in place in the pool, and nothing that grows with it beside."""
    capfd.readouterr()
    compiled, pool = compiled_step(tokens, lora_mode, "mosaic")
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < 64 << 20
    assert not re.findall(rf"bf16\[{LAYERS},{PAGES},\S+ copy.*", text)
    assert len(kernels_in(compiled)) == LAYERS * of_layer + of_head
    assert not any(spilled("".join(capfd.readouterr())).values())


@needs_jax_triton
@pytest.mark.parametrize(
    ("tokens", "lora_mode", "of_layer", "of_head"),
    [
        # RoPE with the KV write, attention; LoRA of each projection, in two halves. With prompts:
        # attention of those and of decodes, LoRA of blocks and of single tokens (q, k and v of
        # which are one kernel).
        (ROWS, "none", 2, 0),
        (ROWS, "all", 2 + 4 * 2, 2),
        (128, "all", 3 + 4 * 4 - 1, 2),
    ],
    ids=lambda value: str(value),
)
def test_triton_step(tokens, lora_mode, of_layer, of_head):
    """Its kernels, those that write into the pool in place."""
    compiled, pool = compiled_step(tokens, lora_mode, "triton")
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < 64 << 20
    assert not re.findall(rf"bf16\[{LAYERS},{PAGES},\S+ copy.*", text)
    assert len(triton_kernels_in(compiled)) == LAYERS * of_layer + of_head


def test_install_aliases_the_pool():
    (_, pool, *_), shape = step_shapes(
        LLAMA_2_7B_4_LAYERS,
        pages=PAGES,
        rows=16,
        tokens=16,
        lora_mode="none",
        dtype=jnp.bfloat16,
    )
    pages = jax.ShapeDtypeStruct((8,), jnp.int32)
    contents = jax.ShapeDtypeStruct((8, *pool.shape[::2]), pool.dtype)
    compiled = compile_for_h200(programs.install_pages, pool, pages, contents, mesh=shape.mesh)
    memory = compiled.memory_analysis()
    size = pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // 8


@pytest.mark.parametrize(
    ("partition", "reduces", "gathers"), [("no-comm", 2, 0), ("slora", 2 + 2, 2)]
)
def test_step_on_two(partition, reduces, gathers):
    """Each device's part of the pool is updated in place; collectives are the partition's own."""
    args, shape = step_shapes(
        LLAMA_2_7B_4_LAYERS,
        pages=PAGES,
        rows=ROWS,
        tokens=ROWS,
        lora_mode="layers",
        dtype=jnp.bfloat16,
        backend="mosaic",
        devices=2,
        partition=partition,
        mesh=two_h200s(),
    )
    compiled = compile_for_two(programs.model_step, *args, shape=shape)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= args[1].size * args[1].dtype.itemsize // 2
    assert memory.temp_size_in_bytes < 64 << 20
    of_layer = 6 + (4 if partition == "no-comm" else 4 * 2)
    assert len(kernels_in(compiled)) == LAYERS * of_layer + 1
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1 + LAYERS * reduces
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1 + LAYERS * gathers
