# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the LoRA operations."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import lora_expand, lora_lookup, lora_shrink
from pallas_kernels.layout import TILE_ELEMS
from pallas_kernels.slabs import pack_matrix
from tests.pallas_kernels.pages import LAYOUTS, Pages, RandomAdapters

MAX_RANK = 24
CASES = {
    "one adapter": ([[8]], [5], (96,)),
    "unequal ranks": ([[1], [24], [8], [5]], [1, 3, 2, 1], (70,)),
    "fused, some modules missing": ([[4, 0, 12], [0, 0, 0], [24, 3, 0]], [2, 2, 1], (96, 40, 40)),
    "empty segments": ([[8, 8], [8, 8]], [3, 0], (64, 64)),
    "base only": ([[8]], [0], (64,)),
}


@pytest.mark.parametrize("layer", [2, None], ids=["layer", "outer"])
@pytest.mark.parametrize(("ranks", "lengths", "outputs"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("inputs", [40, 600])
def test_shrink_then_expand(pages, ranks, lengths, outputs, inputs, layer):
    adapters = Adapters(pages, ranks, lengths, inputs, outputs, layer)
    tokens = sum(lengths) + 3  # the last three are the base model's
    x = pages.rng.standard_normal((tokens, inputs)).astype(np.float32)
    y = pages.rng.standard_normal((tokens, sum(outputs))).astype(np.float32)
    where = (
        jnp.asarray(pages.pool),
        None if layer is None else jnp.int32(layer),
        adapters.segments,
        adapters.table,
    )
    h = lora_shrink(jnp.asarray(x), *where, max_rank=MAX_RANK, layout=pages.layout)
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(h, adapters.shrink(x, MAX_RANK), atol=1e-5)
    got = lora_expand(
        jnp.asarray(y), h, *where, inputs=inputs, outputs=outputs, layout=pages.layout
    )
    want = adapters.expand(y, adapters.shrink(x, MAX_RANK), outputs)
    np.testing.assert_allclose(got, want, atol=1e-4)
    base = sum(lengths)
    np.testing.assert_array_equal(got[base:], y[base:])


def test_lookup(pages):
    vocab, embed = 700, 40
    adapters = Adapters(pages, [[4], [24], [0]], [3, 2, 1], vocab, (embed,), None)
    tokens = pages.rng.integers(0, vocab, 8)
    got = lora_lookup(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(pages.pool),
        adapters.segments,
        adapters.table,
        vocab=vocab,
        max_rank=MAX_RANK,
        layout=pages.layout,
    )
    want = adapters.shrink(np.eye(vocab)[tokens], MAX_RANK)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_padding_segments_reach_nobody():
    """A segment without tokens may name pages that hold anything by now."""
    pages = Pages(LAYOUTS["llama"])
    adapters = Adapters(pages, [[8], [8]], [2, 0], 64, (64,), 0)
    nowhere = jnp.asarray(pages.take(adapters.segments.pages.shape[1]), jnp.int32)  # full of NaN
    segments = adapters.segments._replace(pages=adapters.segments.pages.at[1].set(nowhere))
    where = jnp.asarray(pages.pool), jnp.int32(0), segments, adapters.table
    x = jnp.ones((4, 64), jnp.float32)
    h = lora_shrink(x, *where, max_rank=8, layout=pages.layout)
    got = lora_expand(x, h, *where, inputs=64, outputs=(64,), layout=pages.layout)
    assert np.isfinite(got).all()


def test_h_is_not_rounded():
    """A delta that bfloat16 h would lose survives in a float32 output (vLLM #2893)."""
    pages = Pages(LAYOUTS["llama"])
    adapters = Adapters(pages, [[8]], [4], 64, (64,), 0)
    x = pages.rng.standard_normal((4, 64)).astype(np.float32)
    where = jnp.asarray(pages.pool), jnp.int32(0), adapters.segments, adapters.table
    h = lora_shrink(jnp.asarray(x), *where, max_rank=8, layout=pages.layout)
    zero = jnp.zeros((4, 64), jnp.float32)
    got = lora_expand(zero, h, *where, inputs=64, outputs=(64,), layout=pages.layout)
    want = adapters.expand(np.zeros((4, 64)), adapters.shrink(x, 8), (64,))
    assert np.abs(got - want).max() < 1e-5 < np.abs(want).max() * 2**-9


@settings(deadline=None, max_examples=60)
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
