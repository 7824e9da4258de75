# SPDX-License-Identifier: Apache-2.0
"""The list of LoRA work that a step's kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import PAGES_AT_HAND, with_work

SEGMENTS, LINES, MODULES, PAGES = 5, 3, 2, 40
LAYOUT = PageLayout(kv_heads=8, head_dim=64, page_size=16)  # four tiles a page
make = jax.jit(with_work, static_argnames=("layout", "tokens", "block", "few"))


@settings(max_examples=60)
@given(
    ends=st.lists(st.floats(0, 1), min_size=SEGMENTS, max_size=SEGMENTS).map(sorted),
    tokens=st.sampled_from([3, 130]),
    block=st.sampled_from([1, 8, 64]),
    few=st.sampled_from([0, 1, 7]),
    seed=st.integers(0, 99),
)
def test_every_token_is_in_one_line(ends, tokens, block, few, seed):
    lengths = np.diff(np.round(np.array(ends) * tokens).astype(int), prepend=0)
    rng, shape = np.random.default_rng(seed), (SEGMENTS, LINES, MODULES)
    rank, first_tile = rng.integers(0, 40, shape), rng.integers(0, 150, shape)
    pages = rng.permutation(SEGMENTS * PAGES).reshape(SEGMENTS, PAGES)
    scale = rng.random(shape).astype(np.float32)
    ints = (jnp.asarray(x, jnp.int32) for x in (lengths, pages, rank, first_tile))
    size = {"tokens": tokens, "block": block, "few": few}
    made = make(*ints, jnp.asarray(scale), layout=LAYOUT, **size)
    blocks = [block] * (block == 1 or tokens > few or tokens >= block)
    assert [work.block for work in made.work] == blocks + [1] * (block > 1 and few > 0)
    assert all(work.lines.shape[2] > 0 for work in made.work)

    owner = np.repeat(np.arange(SEGMENTS), lengths)
    seen = np.zeros(len(owner), int)
    for work in made.work:
        mine = check_lines(work, owner, rank, first_tile, scale, pages)
        np.testing.assert_array_equal(work.has(len(owner)), mine > 0)
        seen += mine
        if block > 1 and few > 0:  # runs of few tokens are single, the others are not
            np.testing.assert_array_equal(mine > 0, (lengths[owner] <= few) == (work.block == 1))
    np.testing.assert_array_equal(seen, 1)


def check_lines(work, owner, rank, first_tile, scale, pages):
    """What one list says; how often each token is in it."""
    lines = np.asarray(work.lines)
    assert lines.shape[:2] == (LINES, MODULES)
    # All but the ranks, tiles and scales is the same for every module.
    first, size, _, _, segment = np.moveaxis(lines[..., :5], -1, 0)
    for field in first, size, segment:
        assert (field == field[0, 0]).all()
    first, size, segment = first[0, 0], size[0, 0], segment[0, 0]
    used = size > 0
    assert used[: work.count[0]].all()
    assert not used[work.count[0] :].any()  # empty lines come last
    seen = np.zeros(len(owner), int)
    for line in np.flatnonzero(used):
        mine = slice(first[line], first[line] + size[line])
        seen[mine] += 1
        assert (owner[mine] == segment[line]).all()
        # A kernel takes a line's tokens in `block` rows that start at a multiple of it.
        assert first[line] // work.block == (first[line] + size[line] - 1) // work.block
        np.testing.assert_array_equal(lines[:, :, line, 2], -(-rank[segment[line]] // 8))
        np.testing.assert_array_equal(lines[:, :, line, 3], first_tile[segment[line]])
        np.testing.assert_array_equal(work.scale[:, :, line], scale[segment[line]])
        slot = first_tile[segment[line]] // LAYOUT.tiles_per_page
        slot[-1] //= LINES - 1  # of modules that belong to no layer
        for n in range(PAGES_AT_HAND):
            page = pages[segment[line]][np.minimum(slot + n, PAGES - 1)]
            np.testing.assert_array_equal(lines[:, :, line, 5 + n], page)
    largest = rank.sum((1, 2))[segment[used]]
    assert (np.diff(largest) <= 0).all()  # the last ones to start are not the longest
    return seen
