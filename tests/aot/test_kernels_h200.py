# SPDX-License-Identifier: Apache-2.0
"""Every Mosaic kernel compiles for an H200 in the shapes of true models, and spills no register."""

from dataclasses import replace
from functools import partial
from itertools import batched

import jax
import jax.numpy as jnp
import pytest

from benchmarks.shapes import KERNEL_SHAPES
from pallas_kernels import (
    Modules,
    PageLayout,
    kv_write,
    lora_delta,
    lora_expand,
    lora_shrink,
    paged_decode,
    paged_prefill,
    rope_kv_write,
    silu_gated,
    skinny_matmul,
)
from pallas_kernels.layout import ceil_div
from pallas_kernels.segments import with_work
from tests.aot.h200 import NEEDS_WHEELS, compile_for_h200, kernels_in, spilled

pytestmark = NEEDS_WHEELS
BF16, PAGE_SIZE, ROWS, CHUNK = jnp.bfloat16, 16, 64, 512


@pytest.fixture(params=KERNEL_SHAPES.values(), ids=KERNEL_SHAPES)
def config(request):
    return request.param


@pytest.fixture
def layout(config) -> PageLayout:
    return PageLayout(config.num_key_value_heads, config.head_dim, PAGE_SIZE)


@pytest.fixture
def compiles(capfd):
    """Compiles a function of shapes into so many kernels, and looks at what ptxas says of them."""

    def check(function, *args, kernels=1, donate=()):
        capfd.readouterr()
        compiled = compile_for_h200(jax.jit(function, donate_argnums=donate), *args)
        assert len(kernels_in(compiled)) == kernels
        said = spilled("".join(capfd.readouterr()))
        assert said, "ptxas said nothing"
        assert not any(said.values()), said
        return compiled

    return check


def shape(*dimensions, dtype=BF16):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def ints(*dimensions):
    return shape(*dimensions, dtype=jnp.int32)


def pool_of(layout: PageLayout, layers: int = 2):
    """More than 2³² elements."""
    return shape(layers, ceil_div(2**32, layers * layout.page_elems) + 1, layout.page_elems)


def linears(config) -> dict[str, Modules]:
    """The fused projections of a layer, by name."""
    fused = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    return {
        name: Modules(0, config.projection_shape(names[0])[0], outputs)
        for name, names in fused.items()
        for outputs in [tuple(config.projection_shape(n)[1] for n in names)]
    }


@pytest.mark.parametrize("tokens", [ROWS, CHUNK])
def test_writes(config, layout, compiles, tokens):
    pool, heads = pool_of(layout), config.num_attention_heads
    k = shape(tokens, layout.kv_heads, layout.head_dim)
    qkv = shape(tokens, (heads + 2 * layout.kv_heads) * layout.head_dim)
    angles = [shape(tokens, layout.head_dim // 2, dtype=jnp.float32)] * 2
    where = [ints(tokens)] * 2
    static = {"layout": layout, "backend": "mosaic"}
    for compiled in (
        compiles(partial(kv_write, **static), pool, ints(), k, k, *where, donate=0),
        compiles(
            partial(rope_kv_write, heads=heads, **static),
            *(pool, ints(), qkv, *angles, *where),
            donate=0,
        ),
    ):
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == pool.size * 2
        assert memory.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("rows", [1, ROWS])
def test_decode(config, layout, compiles, rows):
    q = shape(rows, config.num_attention_heads, layout.head_dim)
    lengths = ints(rows, config.max_position_embeddings // PAGE_SIZE), ints(rows)
    attend = partial(paged_decode, layout=layout, backend="mosaic")
    compiles(attend, q, pool_of(layout), ints(), *lengths)


def test_prefill(config, layout, compiles):
    q = shape(CHUNK, config.num_attention_heads, layout.head_dim)
    table = ints(ROWS, config.max_position_embeddings // PAGE_SIZE)
    attend = partial(paged_prefill, layout=layout, backend="mosaic")
    compiles(attend, q, pool_of(layout), ints(), table, *[ints(ROWS)] * 3, kernels=2)


@pytest.mark.parametrize("tokens", [1, ROWS, 128])
def test_matmul(config, compiles, tokens):
    def all_of(*operands):
        return [
            skinny_matmul(x, w, gated=name == "gate_up", backend="mosaic")
            for name, (x, w) in zip(linears(config), batched(operands, 2), strict=True)
        ]

    operands = []
    for modules in linears(config).values():
        operands += [shape(tokens, modules.inputs), shape(sum(modules.outputs), modules.inputs)]
    compiles(all_of, *operands, kernels=4)


EVERY, SOME = ("qkv", "o", "gate_up", "down"), ("qkv", "down")  # a kernel takes seconds


@pytest.mark.parametrize(
    ("names", "tokens", "block", "max_rank"),
    [(EVERY, ROWS, 1, 64), (SOME, ROWS, 1, 256), (SOME, CHUNK, 64, 64), (SOME, CHUNK, 64, 256)],
    ids=["decode", "decode of large ranks", "prompts", "prompts of large ranks"],
)
def test_lora(config, layout, compiles, names, tokens, block, max_rank):
    kernels = len(names) * (1 if block == 1 else 2)
    check_lora(config, layout, compiles, lora_delta, names, tokens, block, max_rank, kernels)


@pytest.mark.parametrize("max_rank", [64, 256])
def test_halves_of_lora(config, layout, compiles, max_rank):
    """Of single tokens: of prompts the whole is its halves."""
    check_lora(config, layout, compiles, halves, SOME, ROWS, 1, max_rank, 2 * len(SOME))


def halves(x, y, pool, layer, adapters, *, modules, max_rank, **static):
    """LoRA of modules with A in columns of the tables, and B in as many behind them."""
    a = replace(modules, outputs=(0,) * modules.count)
    b = replace(modules, first=modules.first + modules.count, inputs=0)
    where = pool, layer, adapters
    h = lora_shrink(x, *where, modules=a, max_rank=max_rank, **static)
    return lora_expand(y, h, *where, modules=b, **static)


def check_lora(
    config, layout, compiles, delta, names, tokens, block, max_rank, kernels, backend="mosaic"
):
    fused = [linears(config)[name] for name in names]

    def all_of(pool, layer, length, pages, rank, first_tile, scale, *operands):
        size = {"layout": layout, "tokens": tokens, "block": block}
        adapters = with_work(length, pages, rank, first_tile, scale, **size)
        static = {"max_rank": max_rank, "layout": layout, "backend": backend}
        return [
            delta(x, y, pool, layer, adapters, modules=modules, **static)
            for modules, (x, y) in zip(fused, batched(operands, 2), strict=True)
        ]

    pool, segments = pool_of(layout), 64
    tables = segments, pool.shape[0] + 1, 7
    operands = [ints(), ints(segments), ints(segments, 100), ints(*tables), ints(*tables)]
    operands.append(shape(*tables, dtype=jnp.float32))
    for modules in fused:
        operands += [shape(tokens, modules.inputs), shape(tokens, sum(modules.outputs))]
    compiles(all_of, pool, *operands, kernels=kernels)


@pytest.mark.parametrize(("delta", "kernels"), [(lora_delta, 1), (halves, 2)], ids=["", "halves"])
@pytest.mark.parametrize("vocab", [32000, 128256, 262144])
def test_lora_of_the_head(compiles, vocab, delta, kernels):
    """Its many outputs are shared in a cluster, which has 8 CTAs at most."""
    layout, segments = PageLayout(kv_heads=8, head_dim=128, page_size=PAGE_SIZE), 64
    pool, modules = pool_of(layout), Modules(0, 4096, (vocab,))
    tables = segments, pool.shape[0] + 1, 2

    def head(pool, length, pages, rank, first_tile, scale, x, y):
        size = {"layout": layout, "tokens": ROWS, "block": 1}
        adapters = with_work(length, pages, rank, first_tile, scale, **size)
        static = {"modules": modules, "max_rank": 64, "layout": layout, "backend": "mosaic"}
        return delta(x, y, pool, None, adapters, **static)

    operands = ints(segments), ints(segments, 300), ints(*tables), ints(*tables)
    scale = shape(*tables, dtype=jnp.float32)
    compiles(head, pool, *operands, scale, shape(ROWS, 4096), shape(ROWS, vocab), kernels=kernels)


def test_silu_has_no_intermediate_rounding():
    """XLA would do each of its operations in bfloat16, and a kernel's tokens get other numbers."""
    compiled = compile_for_h200(jax.jit(silu_gated), shape(ROWS, 22016))
    exponentials = [line for line in compiled.as_text().splitlines() if " exponential(" in line]
    assert exponentials
    assert all("= f32[" in line for line in exponentials)
