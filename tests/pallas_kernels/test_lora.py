# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the LoRA operations."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import lora_delta, lora_expand, lora_lookup, lora_shrink
from pallas_kernels.layout import TILE_ELEMS
from pallas_kernels.slabs import pack_matrix
from tests.pallas_kernels.pages import LAYOUTS, Pages, RandomAdapters, assert_close, rounded

MAX_RANK = 24
BASE = 3  # tokens of the base model, which follow those with adapters
CASES = {
    "one adapter": ([[8]], [5], (96,)),
    "unequal ranks": ([[1], [24], [8], [5]], [1, 3, 2, 1], (70,)),
    "fused, some modules missing": ([[4, 0, 12], [0, 0, 0], [24, 3, 0]], [2, 2, 1], (96, 40, 40)),
    "empty segments": ([[8, 8], [8, 8]], [3, 0], (64, 64)),
    "base only": ([[8]], [0], (64,)),
}


def numbers(pages, tokens, columns):
    return rounded(pages.rng.standard_normal((tokens, columns)))


def where(pages, adapters, layer, dtype=jnp.float32):
    """The arguments that say where the matrices are."""
    line = None if layer is None else jnp.int32(layer)
    return jnp.asarray(pages.pool, dtype), line, adapters


@pytest.mark.parametrize(("ranks", "lengths", "outputs"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("inputs", "layer"), [(40, None), (600, 2)], ids=["outer", "layer"])
def test_shrink_then_expand(pages, ranks, lengths, outputs, inputs, layer):
    tokens = sum(lengths) + BASE
    lora = RandomAdapters(pages, ranks, lengths, inputs, outputs, layer, tokens)
    x, y = numbers(pages, tokens, inputs), numbers(pages, tokens, sum(outputs))
    there = where(pages, lora.adapters, layer)
    static = {"modules": lora.modules, "layout": pages.layout}
    h = lora_shrink(jnp.asarray(x), *there, max_rank=MAX_RANK, **static)
    assert h.dtype == jnp.float32
    want = lora.shrink(x, MAX_RANK)
    assert_close(h, want)
    got = lora_expand(jnp.asarray(y), h, *there, **static)
    assert_close(got, lora.expand(y, want, outputs))
    base = sum(lengths)
    np.testing.assert_array_equal(got[base:], y[base:])


DELTA_CASES = {  # layout, ranks, lengths, inputs, outputs, layer; multiples of 64, as Mosaic needs
    "one token": ("llama", [[8]], [1], 64, (64,), 1),
    "outputs in several passes": ("llama", [[8]], [3], 128, (1600,), 0),
    "an odd number of tiles": ("wide", [[8], [11]], [2, 1], 1088, (576,), 1),
    "unequal ranks": ("llama", [[1], [24], [8], [5]], [1, 3, 2, 1], 640, (576,), 1),
    "fused, some modules missing": (
        "wide",
        [[4, 0, 12], [0, 0, 0], [24, 3, 0], [1, 1, 1]],
        [1, 2, 3, 0],
        1088,
        (576, 128, 128),
        1,
    ),
    "outer": ("wide", [[8], [20]], [1, 3], 64, (1600,), None),
    "large ranks": ("wide", [[100], [8]], [2, 3], 64, (128,), 0),
    "base only": ("llama", [[8]], [0], 64, (64,), 0),
}


SLOW = pytest.mark.long_in_mosaics_interpreter
FEW = "unequal ranks", "fused, some modules missing", "base only"  # show most


def halves(x, y, *where, max_rank, **static):
    """`lora_delta` as what it is said to be."""
    h = lora_shrink(x, *where, max_rank=max_rank, **static)
    return lora_expand(y, h, *where, **static)


# Of blocks the whole is its halves; of single tokens there is a kernel that does both.
WAYS = pytest.mark.parametrize(
    ("delta", "block"),
    [
        (lora_delta, 1),
        pytest.param(halves, 1, marks=SLOW),
        pytest.param(lora_delta, 64, marks=SLOW),
    ],
    ids=["single tokens", "single tokens, halves", "blocks of 64"],
)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, 1) for name in FEW]
    + [("fused, some modules missing", 64)]
    + [pytest.param(name, 1, marks=SLOW) for name in DELTA_CASES if name not in FEW]
    + [pytest.param(name, 64, marks=SLOW) for name in DELTA_CASES if name != FEW[1]],
)
def test_delta(backend, dtype, name, block):
    name, *shape = DELTA_CASES[name]
    check_delta(Pages(LAYOUTS[name]), lora_delta, backend, dtype, block, *shape)


def check_delta(
    pages, delta, backend, dtype, block, ranks, lengths, inputs, outputs, layer, base=BASE, few=0
):
    tokens = sum(lengths) + base
    work = {"block": block, "few": few}
    lora = RandomAdapters(pages, ranks, lengths, inputs, outputs, layer, tokens, **work)
    x, y = numbers(pages, tokens, inputs), numbers(pages, tokens, sum(outputs))
    max_rank = max(MAX_RANK, int(lora.ranks.max()))
    static = {"modules": lora.modules, "layout": pages.layout, "backend": backend}
    got = jax.jit(partial(delta, **static, max_rank=max_rank))(
        jnp.asarray(x, dtype),
        jnp.asarray(y, dtype),
        *where(pages, lora.adapters, layer, dtype),
    )
    assert_close(got, lora.expand(y, lora.shrink(x, max_rank), outputs))
    np.testing.assert_array_equal(got[sum(lengths) :].astype(jnp.float32), y[sum(lengths) :])


@SLOW
def test_delta_of_runs_longer_than_a_block(backend, dtype):
    """Runs that begin and end anywhere between the multiples of 64 at which they are cut."""
    pages = Pages(LAYOUTS["wide"])
    ranks, lengths = [[8, 3], [0, 24], [5, 5], [1, 0]], [13, 70, 1, 60]
    check_delta(pages, lora_delta, backend, dtype, 64, ranks, lengths, 320, (128, 64), 1, base=20)


@pytest.mark.parametrize(
    "delta", [pytest.param(delta, marks=SLOW) for delta in (lora_delta, halves)]
)
def test_delta_of_long_and_of_short_runs(delta, backend, dtype):
    """Both kernels on one step: neither touches the other's tokens."""
    pages = Pages(LAYOUTS["wide"])
    ranks, lengths = [[8, 3], [24, 0], [5, 5], [16, 8]], [2, 67, 1, 4]
    check_delta(pages, delta, backend, dtype, 64, ranks, lengths, 128, (128, 64), 1, few=2)


@SLOW
def test_delta_of_a_step_too_short_for_a_block(backend, dtype):
    """One of its lists of work has no lines, whatever the step's tokens are."""
    pages = Pages(LAYOUTS["wide"])
    case = [[8, 3], [5, 5]], [2, 1], 128, (128, 64), 1
    check_delta(pages, lora_delta, backend, dtype, 64, *case, few=8)
    check_delta(pages, halves, backend, dtype, 64, *case, few=8)


OTHER_CONSTANTS = {  # of Triton's kernels: programs that do more, or less
    "halves": {"whole_ranks": 0},
    "several slabs": {"whole_tiles": 2, "whole_slabs": 2},
    "several tiles": {
        "whole_ranks": 0,
        "shrink_parts": 2,  # of 3 tiles
        "shrink_tiles": 2,
        "expand_tiles": 2,
        "expand_slabs": 2,
    },
    "one part": {"whole_ranks": 0, "shrink_parts": 1},
    "one part of blocks": {"block_parts": 1},
    "ranks in turn": {"block_parts": 3, "block_expand_ranks": 16, "block_shrink_ranks": 16},
}


@pytest.mark.parametrize("constants", OTHER_CONSTANTS.values(), ids=OTHER_CONSTANTS.keys())
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_delta_with_other_constants(backend, dtype, constants, monkeypatch):
    from pallas_kernels.lora_triton import TUNING  # needs the extra

    for capability, tuning in TUNING.items():
        monkeypatch.setitem(TUNING, capability, replace(tuning, **constants))
    block = 64 if any(name.startswith("block") for name in constants) else 1
    for name in "unequal ranks", "fused, some modules missing", "outer", "large ranks", "base only":
        layout, *case = DELTA_CASES[name]
        check_delta(Pages(LAYOUTS[layout]), lora_delta, backend, dtype, block, *case)


@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_no_part_reads_past_a_slab(backend, dtype, block, monkeypatch):
    """Three parts of 1024 columns end behind the last one, where the pool is full of NaN."""
    from pallas_kernels.lora_triton import TUNING  # needs the extra

    for capability, tuning in TUNING.items():
        monkeypatch.setitem(TUNING, capability, replace(tuning, shrink_parts=3, block_parts=3))
    pages, tokens = Pages(LAYOUTS["llama"]), 4 + BASE
    lora = RandomAdapters(pages, [[MAX_RANK]], [4], 1024, (0,), 1, tokens, block=block)
    x = numbers(pages, tokens, 1024)
    static = {"modules": lora.modules, "layout": pages.layout, "backend": backend}
    there = where(pages, lora.adapters, 1, dtype)
    h = lora_shrink(jnp.asarray(x, dtype), *there, max_rank=MAX_RANK, **static)
    assert_close(h, lora.shrink(x, MAX_RANK))


APART = (
    "outputs in several passes",
    "an odd number of tiles",
    "fused, some modules missing",
    "outer",
    "large ranks",
)
HALVES_CASES = {  # with A and B in columns of their own; and B behind A
    **{f"{name}, apart": (*DELTA_CASES[name], True) for name in APART},
    "fused, some modules missing": (*DELTA_CASES["fused, some modules missing"], False),
    "odd inputs": ("llama", [[8], [3]], [2, 1], 40, (128,), 1, False),
    "odd outputs": ("llama", [[8], [3]], [2, 1], 128, (40,), 1, False),
}
ODD = "odd inputs", "odd outputs"
IN_BLOCKS = "fused, some modules missing, apart", *ODD


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, 1) for name in ODD]
    + [pytest.param(name, 1, marks=SLOW) for name in HALVES_CASES if name not in ODD]
    + [pytest.param(name, 64, marks=SLOW) for name in IN_BLOCKS]
    + [pytest.param("outer, apart", 64, marks=pytest.mark.long)],
)
def test_halves(backend, dtype, name, block):
    """Each half on its own, as where h crosses devices between them."""
    layout, ranks, lengths, inputs, outputs, layer, apart = HALVES_CASES[name]
    pages, tokens, used = Pages(LAYOUTS[layout]), sum(lengths) + BASE, sum(lengths)

    def make(inputs, outputs):
        return RandomAdapters(pages, ranks, lengths, inputs, outputs, layer, tokens, block=block)

    if apart:
        a, b = make(inputs, (0,) * len(outputs)), make(0, outputs)
    else:
        a = b = make(inputs, outputs)
    x, y = numbers(pages, tokens, inputs), numbers(pages, tokens, sum(outputs))
    max_rank = max(MAX_RANK, int(a.ranks.max()))
    static = {"layout": pages.layout, "backend": backend}

    shrink = partial(lora_shrink, modules=a.modules, max_rank=max_rank, **static)
    h = jax.jit(shrink)(jnp.asarray(x, dtype), *where(pages, a.adapters, layer, dtype))
    want = a.shrink(x, max_rank)
    assert h.dtype == jnp.float32
    assert_close(h, want)

    h = np.where(want == 0, 0, pages.rng.standard_normal(h.shape)).astype(np.float32)
    h[used:] = np.nan  # of the base model's tokens it reaches nobody
    expand = jax.jit(partial(lora_expand, modules=b.modules, **static))
    got = expand(jnp.asarray(y, dtype), h, *where(pages, b.adapters, layer, dtype))
    assert_close(got, b.expand(y, h, outputs))
    np.testing.assert_array_equal(got[used:].astype(jnp.float32), y[used:])


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_a_matrix_without_columns_takes_no_tiles(layout, rank):
    assert layout.section_tiles(rank, 0) == layout.section_tiles(0, 64) == 0
    assert layout.b_first_tile(5, rank, 0) == 5
    assert layout.module_tiles(rank, 0, 64) == layout.section_tiles(rank, 64) > 0


@WAYS
def test_base_tokens_may_be_anything(delta, backend, dtype, block):
    """Padding tokens of a step hold no numbers: they reach nobody, and come back as they are."""
    pages = Pages(LAYOUTS["llama"])
    lora = RandomAdapters(pages, [[8], [8]], [2, 3], 64, (64,), 0, 8, block=block)
    x, y = numbers(pages, 8, 64), numbers(pages, 8, 64)
    x[5:], y[5:] = np.nan, np.nan
    static = {"modules": lora.modules, "layout": pages.layout, "backend": backend}
    got = jax.jit(partial(delta, **static, max_rank=8))(
        jnp.asarray(x, dtype), jnp.asarray(y, dtype), *where(pages, lora.adapters, 0, dtype)
    )
    assert_close(got[:5], lora.expand(y, lora.shrink(x[:5], 8), (64,))[:5])
    assert np.isnan(got[5:].astype(jnp.float32)).all()


def test_lookup(pages):
    vocab, embed = 700, 40
    lora = RandomAdapters(pages, [[4], [24], [0]], [3, 2, 1], vocab, (embed,), None, 8)
    tokens = pages.rng.integers(0, vocab, 8)
    got = lora_lookup(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(pages.pool),
        lora.adapters,
        modules=lora.modules,
        max_rank=MAX_RANK,
        layout=pages.layout,
    )
    assert_close(got, lora.shrink(np.eye(vocab)[tokens], MAX_RANK))


@WAYS
def test_padding_segments_reach_nobody(delta, backend, dtype, block):
    """A segment without tokens may name pages that hold anything by now."""
    pages = Pages(LAYOUTS["llama"])
    lora = RandomAdapters(pages, [[8], [8]], [2, 0], 64, (64,), 0, 4, block=block)
    nowhere = jnp.asarray(pages.take(lora.adapters.pages.shape[1]), jnp.int32)  # full of NaN
    adapters = replace(lora.adapters, pages=lora.adapters.pages.at[1].set(nowhere))
    x = jnp.ones((4, 64), dtype)
    static = {"modules": lora.modules, "max_rank": 8, "layout": pages.layout, "backend": backend}
    got = jax.jit(partial(delta, **static))(x, x, *where(pages, adapters, 0, dtype))
    assert np.isfinite(got.astype(jnp.float32)).all()


@WAYS
def test_h_is_not_rounded(delta, backend, dtype, block):
    """A delta that h in bfloat16 would lose survives (vLLM #2893).

    y takes away all of it that bfloat16 can hold. Of the rest, 2⁻⁹ of it, h must still know much.
    """
    pages = Pages(LAYOUTS["llama"])
    lora = RandomAdapters(pages, [[8]], [4], 64, (64,), 0, 4, block=block)
    x, zero = numbers(pages, 4, 64), np.zeros((4, 64), np.float32)
    y = -rounded(lora.expand(zero, lora.shrink(x, 8), (64,)))
    static = {"modules": lora.modules, "max_rank": 8, "layout": pages.layout, "backend": backend}
    got = jax.jit(partial(delta, **static))(
        jnp.asarray(x, dtype), jnp.asarray(y, dtype), *where(pages, lora.adapters, 0, dtype)
    )
    want = lora.expand(y, lora.shrink(x, 8), (64,))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@settings(max_examples=60)
@given(rank=st.integers(1, 40), columns=st.integers(1, 2100), name=st.sampled_from([*LAYOUTS]))
def test_packed_tiles_follow_the_format(rank, columns, name):
    """Row 8 j + i of tile t of slab s holds rank 8 s + i, columns 512 t + 64 j …"""
    layout = LAYOUTS[name]
    matrix = np.arange(1, rank * columns + 1, dtype=np.float32).reshape(rank, columns)
    tiles = pack_matrix(matrix, layout)
    assert tiles.shape == (layout.section_tiles(rank, columns), TILE_ELEMS)
    assert len(tiles) % layout.copy_tiles == 0
    assert layout.tiles_per_page % layout.copy_tiles == 0
    assert np.count_nonzero(tiles) == rank * columns
    for r, c in {(0, 0), (rank - 1, columns - 1), (rank // 2, columns // 3)}:
        tile = r // 8 * layout.slab_tiles(columns) + c // 512
        row = 8 * (c % 512 // 64) + r % 8
        assert tiles.reshape(-1, 64, 64)[tile, row, c % 64] == matrix[r, c]
