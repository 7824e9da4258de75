# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the operations that write keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_write, rope_kv_write
from pallas_kernels.layout import PageLayout
from pallas_kernels.rope_kv_write.reference import rotate
from tests.pallas_kernels.pages import LAYOUTS

LAYER, TOKENS = 1, 5
MORE_LAYOUTS = {
    "one head": PageLayout(kv_heads=1, head_dim=128, page_size=16),
    "three heads": PageLayout(kv_heads=3, head_dim=128, page_size=32),
}


@pytest.fixture(params=[*LAYOUTS.values(), *MORE_LAYOUTS.values()], ids=[*LAYOUTS, *MORE_LAYOUTS])
def layout(request) -> PageLayout:
    return request.param


@pytest.fixture
def where(pages) -> tuple[np.ndarray, np.ndarray]:
    """Page and offset of each token: two share a page, the last is padding."""
    page = np.array([*pages.take(TOKENS - 1), pages.num_pages], np.int32)
    page[1] = page[0]
    return page, np.array([0, 15, 7, 3, 2], np.int32)


def expect(pages, k, v, where):
    """The tokens' rows of the pool, and nothing else of it, NaN included, are written."""
    k, v = (np.asarray(x, np.float32) for x in (k, v))
    for t, (page, offset) in enumerate(zip(*where, strict=True)):
        if page < pages.num_pages:
            pages.write_kv(LAYER, page, offset, k[t], v[t])
    return pages.pool


def test_write_touches_its_rows_only(pages, where, backend, dtype):
    layout = pages.layout
    shape = TOKENS, layout.kv_heads, layout.head_dim
    k, v = (jnp.asarray(pages.rng.standard_normal(shape), dtype) for _ in range(2))
    pool = jnp.asarray(pages.pool, dtype)
    write = jax.jit(kv_write, static_argnames=("layout", "backend"), donate_argnums=0)
    got = write(pool, jnp.int32(LAYER), k, v, *where, layout=layout, backend=backend)
    assert pool.is_deleted()
    np.testing.assert_array_equal(got.astype(jnp.float32), expect(pages, k, v, where))


@pytest.mark.parametrize("group", [1, 4])
def test_rotates_then_writes(pages, where, backend, dtype, group):
    """Exactly as `rotate` does, the queries of padding tokens too."""
    layout = pages.layout
    heads, kv_heads, head_dim = group * layout.kv_heads, layout.kv_heads, layout.head_dim
    x = jnp.asarray(pages.rng.standard_normal((TOKENS, heads + 2 * kv_heads, head_dim)), dtype)
    angle = pages.rng.uniform(0, 7, (TOKENS, head_dim // 2)).astype(np.float32)
    angles = jnp.cos(angle), jnp.sin(angle)
    pool = jnp.asarray(pages.pool, dtype)
    write = jax.jit(rope_kv_write, static_argnames=("heads", "layout", "backend"), donate_argnums=0)
    q, got = write(
        pool,
        jnp.int32(LAYER),
        x.reshape(TOKENS, -1),
        *angles,
        *where,
        heads=heads,
        layout=layout,
        backend=backend,
    )
    assert pool.is_deleted()
    turn = jax.jit(rotate) if backend == "xla" else rotate  # without jit each step is rounded
    rotated = turn(x[:, : heads + kv_heads], *angles)
    np.testing.assert_array_equal(q, rotated[:, :heads])
    written = rotated[:, heads:], x[:, heads + kv_heads :]
    np.testing.assert_array_equal(got.astype(jnp.float32), expect(pages, *written, where))
