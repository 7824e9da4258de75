# SPDX-License-Identifier: Apache-2.0
"""Every kernel on the card, in the shapes of true models, against float32 or float64.

The pool of Llama 2 7B has more elements than 32 bits can count, and its last pages are used.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import KERNEL_SHAPES
from pallas_kernels import (
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
from tests.gpu.compare import BF16, LAYER, agree, at_the_end, in_float32, kv_pool, run, unequal
from tests.pallas_kernels.pages import Pages, RandomAdapters

LARGE = "llama-2-7b"
ONLY_MOSAIC = pytest.mark.parametrize("backend", ["mosaic"], indirect=True)  # has a kernel for it
RAGGED = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024]


@pytest.fixture(params=KERNEL_SHAPES)
def name(request) -> str:
    return request.param


@pytest.fixture
def config(name):
    return KERNEL_SHAPES[name]


@pytest.fixture
def layout(config) -> PageLayout:
    return PageLayout(config.num_key_value_heads, config.head_dim, page_size=16)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def ints(x):
    return jnp.asarray(x, jnp.int32)


def test_writes(backend, name, config, layout):
    check_writes(backend, layout, config.num_attention_heads, large=name == LARGE)


def check_writes(backend, layout, heads, large, tokens=67):
    """One token a page, the last three padding; nothing else of the pool is touched."""
    kv_heads, head_dim, size = layout.kv_heads, layout.head_dim, layout.page_size
    pool = jnp.full((2, tokens, layout.page_elems), jnp.nan, BF16)
    page = ints(np.random.default_rng(0).permutation(tokens))
    offset = jnp.arange(tokens) % size
    if large:
        pool, page = at_the_end(pool, page)
    page = page.at[-3:].set(pool.shape[1])
    static = {"layout": layout, "backend": backend}
    where = page, offset

    def rows(pool):
        """Of all tokens that aren't padding, `[T - 3, 2, K, D]`; and there are no others."""
        view = pool.reshape(*pool.shape[:2], 2, kv_heads, size, head_dim)
        assert int(jnp.isfinite(pool).sum()) == 2 * (tokens - 3) * kv_heads * head_dim
        return view[LAYER, page[:-3], :, :, offset[:-3]]

    k, v = normal(2, tokens, kv_heads, head_dim), normal(3, tokens, kv_heads, head_dim)
    write = jax.jit(partial(kv_write, **static), donate_argnums=0)
    got = write(pool + 0, ints(LAYER), k, v, *where)
    np.testing.assert_array_equal(rows(got), jnp.stack([k, v], axis=1)[:-3])
    del got

    qkv = normal(1, tokens, (heads + 2 * kv_heads) * head_dim)
    angle = np.random.default_rng(1).uniform(0, 7, (tokens, head_dim // 2)).astype(np.float32)
    cos, sin = (jnp.asarray(f(angle)) for f in (np.cos, np.sin))
    write = jax.jit(partial(rope_kv_write, heads=heads, **static), donate_argnums=0)
    q, got = write(pool + 0, ints(LAYER), qkv, cos, sin, *where)
    x = np.asarray(qkv, np.float64).reshape(tokens, -1, head_dim)
    want, v = rotated(x[:, : heads + kv_heads], cos, sin), x[:, heads + kv_heads :]
    agree(q, want[:, :heads])
    agree(rows(got)[:, 0], want[:-3, heads:])
    np.testing.assert_array_equal(np.asarray(rows(got)[:, 1], np.float64), v[:-3])
    q_again, again = write(pool + 0, ints(LAYER), qkv, cos, sin, *where)
    assert int(unequal(q, q_again)) == int(unequal(got, again)) == 0


def rotated(x, cos, sin):
    """Rotary embedding in float64, of angles in bfloat16."""
    first, second = np.split(x, 2, axis=-1)
    c, s = (np.asarray(a.astype(BF16), np.float64)[:, None] for a in (cos, sin))
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


CONTEXTS = {
    "batch": RAGGED + [int(n) for n in np.random.default_rng(0).integers(1, 2049, 46)],
    "few requests": [5000, 0, 77],  # whose contexts are split
}


@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_decode(backend, name, config, layout, contexts):
    check_decode(backend, layout, config.num_attention_heads, contexts, large=name == LARGE)


def check_decode(backend, layout, heads, contexts, large):
    pool, table = kv_pool(layout, contexts, columns=-(-max(contexts) // 16) + 3)
    q, lengths = normal(1, len(contexts), heads, layout.head_dim), ints(contexts)
    want = in_float32(partial(paged_decode, layout=layout), q, pool, ints(LAYER), table, lengths)
    if large:
        pool, table = at_the_end(pool, table)
    attend = partial(paged_decode, layout=layout, backend=backend)
    agree(run(attend, q, pool, ints(LAYER), table, lengths), want)


def test_prefill(backend, config, layout):
    lengths = [1, 1, 1, 200, 15, 16, 17, 64, 3, 0, 0, 128]
    contexts = [1, 17, 900, 200, 31, 16, 1000, 64, 131, 0, 0, 640]
    check_prefill(backend, layout, config.num_attention_heads, lengths, contexts)


def check_prefill(backend, layout, heads, lengths, contexts, gap=5):
    """Requests in another order than their tokens, a gap before each: nobody's tokens are 0."""
    order = np.random.default_rng(0).permutation(len(lengths))
    starts, tokens = np.zeros(len(lengths), int), 0
    for b in order:
        starts[b] = tokens + gap * (lengths[b] > 0)
        tokens = starts[b] + lengths[b]
    tokens += gap
    pool, table = kv_pool(layout, contexts, columns=-(-max(contexts) // 16) + 2)
    q = normal(1, tokens, heads, layout.head_dim)
    args = q, pool, ints(LAYER), table, ints(starts), ints(lengths), ints(contexts)
    want = in_float32(partial(paged_prefill, layout=layout), *args)
    agree(run(partial(paged_prefill, layout=layout, backend=backend), *args), want)


def linears(config) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs and outputs of the fused projections of a layer."""
    fused = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
    names = "qkv", "o", "gate_up", "down"
    return {
        name: (
            config.projection_shape(parts[0])[0],
            tuple(config.projection_shape(n)[1] for n in parts),
        )
        for name, parts in zip(names, fused, strict=True)
    }


@ONLY_MOSAIC
@pytest.mark.parametrize(
    ("which", "tokens"), [("qkv", 64), ("o", 1), ("gate_up", 100), ("down", 128), ("down", 13)]
)
def test_matmul(backend, config, which, tokens):
    inputs, outputs = linears(config)[which]
    check_matmul(backend, tokens, inputs, sum(outputs))


def check_matmul(backend, tokens, inputs, outputs):
    x, w = normal(0, tokens, inputs), normal(1, outputs, inputs)
    agree(run(partial(skinny_matmul, backend=backend), x, w), in_float32(skinny_matmul, x, w))


@ONLY_MOSAIC
@pytest.mark.parametrize("tokens", [1, 13, 64, 128])
def test_gated_matmul(backend, config, tokens):
    """As good as the reference, and what there is of a step in which gates are adapted, too."""
    inputs, outputs = linears(config)["gate_up"]
    x, w = normal(0, tokens, inputs), normal(1, sum(outputs), inputs)
    w = w / inputs**0.5  # SiLU where it bends
    gated = run(partial(skinny_matmul, gated=True, backend=backend), x, w)
    agree(gated, in_float32(partial(skinny_matmul, gated=True), x, w))

    def apart(x, w):
        return silu_gated(skinny_matmul(x, w, whole=True, backend=backend))

    # Two compilers' exp and division differ in float32's last digits: few numbers, of those that
    # lie between two of bfloat16, are rounded the other way.
    other = run(apart, x, w)
    assert int(unequal(gated, other)) <= 1e-3 * gated.size
    np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (gated, other)), rtol=2**-7)


RANKS = [16, 1, 256, 7, 64, 100, 8, 33]
FEW = 2  # of a run: single tokens beside blocks
LORA = [
    (LARGE, "qkv"),
    ("llama-2-13b", "down"),
    ("llama-3-8b", "qkv"),
    ("llama-3-8b", "gate_up"),
    ("llama-3-70b/8", "qkv"),
]


@pytest.mark.parametrize(("name", "which"), LORA)
def test_lora_of_single_tokens(backend, name, config, layout, which):
    lengths = [1, 9, 3, 0, 1, 30, 2, 5]
    check_lora(backend, layout, *linears(config)[which], RANKS, lengths, 1, large=name == LARGE)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
def test_lora_of_single_tokens_of_small_ranks(backend, name, config, layout):
    """As many as Triton takes both halves of in one launch."""
    lengths, ranks = [1, 9, 3, 0, 1, 30, 2, 20], [16, 8, 1, 16, 5, 16, 13, 8]
    inputs, outputs = linears(config)["qkv"]
    if backend == "triton":
        table = importlib.import_module("pallas_kernels.lora_triton").TUNING  # needs the extra
        tuning = importlib.import_module("pallas_kernels.triton").tuned(table)
        assert 3 * sum(lengths) >= tuning.whole_programs
        assert max(ranks) <= tuning.whole_ranks
        assert max(inputs, *outputs) <= tuning.whole_columns
    check_lora(backend, layout, inputs, outputs, ranks, lengths, 1, large=name == LARGE)


@pytest.mark.parametrize(("name", "which"), LORA)
def test_lora_of_prompts(backend, name, config, layout, which):
    lengths = [100, 1, 65, 0, 63, 129, 1, 20]
    check_lora(backend, layout, *linears(config)[which], RANKS, lengths, 64, large=name == LARGE)


@pytest.mark.parametrize("name", ["llama-3-70b/8"])
@pytest.mark.parametrize("block", [1, 64])
def test_half_modules(backend, config, layout, block):
    """B alone in a module's section, as S-LoRA's partition of a tensor has it."""
    lengths, outputs = [20, 1, 65, 0, 9, 3, 1, 2], linears(config)["qkv"][1]
    tokens, base = sum(lengths) + 5, sum(lengths)
    table = [[rank, 8, rank] for rank in RANKS]
    tiles = [
        sum(layout.module_tiles(r, 0, n) for r, n in zip(t, outputs, strict=True)) for t in table
    ]
    pages_each = ceil_div(max(tiles), layout.tiles_per_page)
    pages = Pages(layout, layers=2, pages=pages_each * len(RANKS) + 1)
    shape = table, lengths, 0, outputs, LAYER, tokens, pages_each, block
    lora = RandomAdapters(pages, *shape, few=FEW)
    y, rng = normal(2, tokens, sum(outputs)), np.random.default_rng(3)
    h = rng.standard_normal((tokens, 3, max(RANKS)))
    h *= np.arange(max(RANKS)) < np.asarray(table)[np.r_[lora.owner, [0] * 5], :, None]
    h = h.astype(np.float32)
    want = lora.expand(np.asarray(y, np.float64), h, outputs)
    pool = jnp.asarray(pages.pool.astype(BF16))
    static = {"modules": lora.modules, "layout": layout, "backend": backend}

    def expand(y, h, pool, adapters):
        return lora_expand(y, h, pool, ints(LAYER), adapters, **static)

    got = run(expand, y, jnp.asarray(h), pool, lora.adapters)
    agree(got, want)
    assert int(unequal(got[base:], y[base:])) == 0


@pytest.mark.parametrize("name", ["llama-3-8b"])
def test_lora_of_the_head(backend, config, layout):
    """Tiles of a module that belongs to no layer are spread over the slots of all layers."""
    inputs, outputs = config.projection_shape("lm_head")
    check_lora(backend, layout, inputs, (outputs,), RANKS[:4], [1, 3, 1, 2], 1, layer=None)


def check_lora(
    backend, layout, inputs, outputs, ranks, lengths, block, *, layer=LAYER, large=False
):
    """In one operation, and half by half."""
    tokens = sum(lengths) + 5  # the last five are the base model's
    # An adapter's modules have unequal ranks, and here and there one is missing.
    table = [
        [r if (g + m) % 3 else 8 * m for m in range(len(outputs))] for g, r in enumerate(ranks)
    ]
    if len(outputs) == 1:
        table = [[r] for r in ranks]
    tiles = [
        sum(layout.module_tiles(*shape) for shape in zip(line, [inputs] * 3, outputs, strict=False))
        for line in table
    ]
    pages_each = ceil_div(max(tiles), layout.tiles_per_page)
    pages = Pages(layout, layers=2, pages=pages_each * len(ranks) + 1)
    shape = table, lengths, inputs, outputs, layer, tokens, pages_each, block
    lora = RandomAdapters(pages, *shape, few=FEW)
    x, y = normal(1, tokens, inputs), normal(2, tokens, sum(outputs))
    h = lora.shrink(np.asarray(x, np.float64), max(ranks))
    want = lora.expand(np.asarray(y, np.float64), h, outputs)

    pool, adapters = jnp.asarray(pages.pool.astype(BF16)), lora.adapters
    if large:
        pool, numbers = at_the_end(pool, adapters.pages)
        tables = adapters.rank, adapters.first_tile, adapters.scale
        size = {"layout": layout, "tokens": tokens, "block": block, "few": FEW}
        adapters = with_work(adapters.length, numbers, *tables, **size)  # `work` has pages, too
    line = None if layer is None else ints(layer)
    static = {"modules": lora.modules, "layout": layout, "backend": backend}
    base = sum(lengths)

    def delta(x, y, pool, adapters):
        return lora_delta(x, y, pool, line, adapters, max_rank=max(ranks), **static)

    def shrink(x, pool, adapters):
        return lora_shrink(x, pool, line, adapters, max_rank=max(ranks), **static)

    def expand(y, h, pool, adapters):
        return lora_expand(y, h, pool, line, adapters, **static)

    agree(run(shrink, x, pool, adapters), h, tolerance=1e-4)  # float32, not bfloat16
    h = jnp.asarray(h, jnp.float32)
    for got in run(delta, x, y, pool, adapters), run(expand, y, h, pool, adapters):
        agree(got, want)
        assert int(unequal(got[base:], y[base:])) == 0
