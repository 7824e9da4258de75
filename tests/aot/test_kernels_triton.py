# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs since Ampere, and fits into their shared memory."""

import importlib
import re
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from benchmarks.shapes import KERNEL_SHAPES
from pallas_kernels import (
    PageLayout,
    kv_write,
    lora_delta,
    paged_decode,
    paged_prefill,
    rope_kv_write,
)
from tests.aot.h200 import NEEDS_WHEELS, needs_jax_triton
from tests.aot.test_kernels_h200 import (
    CHUNK,
    PAGE_SIZE,
    ROWS,
    check_lora,
    ints,
    pool_of,
    shape,
)

pytestmark = [*NEEDS_WHEELS, needs_jax_triton]
CARDS = {  # compute capability, multiprocessors, and KiB of shared memory that a program may use
    "NVIDIA A100-SXM4-80GB": (80, 108, 163),
    "NVIDIA A10": (86, 72, 99),
    "NVIDIA L4": (89, 58, 99),
    "NVIDIA H100 80GB HBM3": (90, 132, 227),
}

# What a kernel has if its threads are not dealt out along a tile's columns, 16 bytes each: reads of
# one number, sums of ranks that other threads have.
NARROW = {
    "shrink_single": r"ld\.global\.b16",
    "expand_single": r"ld\.global\.b16|shfl",
    "delta_single": r"ld\.global\.b16",
    "shrink_block": r"ld\.global\.b16",
    "expand_block": r"ld\.global\.b16",
}
# Bytes that may spill, by kernel and capability: prompts' attention was the fastest so, measured.
SPILLS = {("_attend_block", 90): 332}


@pytest.fixture(params=CARDS)
def card(request) -> str:
    return request.param


@pytest.fixture(params=["llama-2-7b", "llama-3-8b"])
def config(request):
    return KERNEL_SHAPES[request.param]


@pytest.fixture
def layout(config) -> PageLayout:
    return PageLayout(config.num_key_value_heads, config.head_dim, PAGE_SIZE)


@pytest.fixture
def compiles(card, monkeypatch, tmp_path):
    """Lowers a function of shapes for a card, down to machine code of its kernels, by name."""
    library = importlib.import_module("pallas_kernels.triton").jax_triton().triton_lib
    capability, cores, most = CARDS[card]
    found, compile_one = [], library.compile_ttir_to_ptx_inplace

    def note(*args):
        result = compile_one(*args)
        found.append(result)
        return result

    monkeypatch.setattr(library, "compile_ttir_to_ptx_inplace", note)
    # It compiles equal kernels once a process.
    monkeypatch.setattr(library.TritonFunction, "_kernel_cache", {})
    device = AbstractDevice(device_kind=card, num_cores=cores, platform="cuda")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)

    def check(function, *args, kernels):
        found.clear()
        with use_abstract_mesh(mesh):
            jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
        assert {result.name for result in found} == set(kernels)
        for result in found:
            name = result.name
            assert f".target sm_{capability}" in result.binary
            assert result.shared_mem_bytes <= most << 10, name
            if name in NARROW:
                assert not re.search(NARROW[name], result.binary), name
            most_spilled = SPILLS.get((name, capability), 0)
            assert spilled(result.binary, tmp_path, capability) <= most_spilled, name

    return check


def spilled(ptx: str, directory: Path, capability: int) -> int:
    """Bytes of registers that spill, as the ptxas that comes with Triton reports."""
    source = directory / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    tool = importlib.import_module("triton").knobs.nvidia.ptxas.path
    command = [tool, "-v", f"-arch={target[1]}", "-o", "/dev/null", source]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def test_attention(config, layout, compiles):
    heads = config.num_attention_heads
    table = ints(ROWS, config.max_position_embeddings // PAGE_SIZE)
    static = {"layout": layout, "backend": "triton"}
    pool = pool_of(layout)
    for rows, names in ((1, ["_decode", "_join"]), (ROWS, ["_decode"])):
        compiles(
            partial(paged_decode, **static),
            *(shape(rows, heads, layout.head_dim), pool, ints()),
            *(ints(rows, table.shape[1]), ints(rows)),
            kernels=names,
        )
    compiles(
        partial(paged_prefill, **static),
        *(shape(CHUNK, heads, layout.head_dim), pool, ints(), table, *[ints(ROWS)] * 3),
        kernels=["_attend_block"],  # `_decode` is known by now
    )


def test_writes(config, layout, compiles):
    pool, heads = pool_of(layout), config.num_attention_heads
    k = shape(ROWS, layout.kv_heads, layout.head_dim)
    qkv = shape(ROWS, (heads + 2 * layout.kv_heads) * layout.head_dim)
    angles = [shape(ROWS, layout.head_dim // 2, dtype=jnp.float32)] * 2
    where, static = [ints(ROWS)] * 2, {"layout": layout, "backend": "triton"}
    compiles(partial(kv_write, **static), pool, ints(), k, k, *where, kernels=["_write"])
    rotate = partial(rope_kv_write, heads=heads, **static)
    compiles(rotate, pool, ints(), qkv, *angles, *where, kernels=["_rotate_and_write"])


@pytest.mark.parametrize("config", [KERNEL_SHAPES["llama-2-7b"]], ids=["llama-2-7b"])
@pytest.mark.parametrize(
    ("tokens", "block"),
    [(ROWS, 1), (CHUNK, 64), (8 * CHUNK, 64)],  # of many blocks x is in less parts
    ids=["decode", "prompts", "many prompts"],
)
@pytest.mark.parametrize("max_rank", [8, 64, 256])
def test_lora(config, layout, compiles, tokens, block, max_rank):
    kind = "single" if block == 1 else "block"
    kernels, what = [f"shrink_{kind}", f"expand_{kind}"], (lora_delta, ("qkv", "down"))
    if block == 1 and max_rank == 8:
        kernels.append("delta_single")  # of qkv, whose modules are many, and not wide
    check_lora(config, layout, compiles, *what, tokens, block, max_rank, kernels, backend="triton")
