# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel where mistakes show, and compares what it gives with float32's or float64's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import PageLayout, ceil_div

LAYER = 1  # of two; the other holds NaN only
RUNS = 3
BF16 = jnp.bfloat16


def run(op: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """A jitted operation's result: the same bits every time, whatever its memory held before."""
    jitted, result = jax.jit(op), jax.eval_shape(op, *args)
    first = None
    for _ in range(RUNS):
        poison = [jnp.full(result.shape, jnp.nan, result.dtype) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison  # what the result gets is most likely of this
        got = jitted(*args)
        first = got if first is None else first
        assert int(unequal(got, first)) == 0
    return first


@jax.jit
def unequal(a: jax.Array, b: jax.Array) -> jax.Array:
    """How many numbers differ in some bit; NaN is equal to itself."""
    words = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (a, b))
    return jnp.not_equal(*words).sum()


def agree(got: jax.Array, want: Any, tolerance: float = 4e-3) -> None:
    """Every row is as close as bfloat16 allows; where it ought to be 0, it is."""
    got, want = (np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in (got, want))
    assert np.isfinite(want).all()
    error, size = np.linalg.norm(got - want, axis=1), np.linalg.norm(want, axis=1)
    wrong = ~(error <= 2 * tolerance * size)  # NaN, too
    assert not wrong.any(), (
        f"rows {np.flatnonzero(wrong)[:20]}: {error[wrong][:20]} of {size[wrong][:20]}"
    )
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(size)


def in_float32(op: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """What the operation gives of the same numbers in float32, without TF32."""
    wide = [x.astype(jnp.float32) if getattr(x, "dtype", None) == BF16 else x for x in args]
    with jax.default_matmul_precision("highest"):
        return jax.jit(op)(*wide)


def kv_pool(layout: PageLayout, contexts: Any, columns: int) -> tuple[jax.Array, jax.Array]:
    """Random keys and values in pages in random order, NaN past the contexts and in other pages.

    Returns:
        The pool and `[requests, columns]` of pages; entries past a context are pages of NaN.
    """
    rng, contexts = np.random.default_rng(0), np.asarray(contexts)
    size = layout.page_size
    used = ceil_div(contexts, size)
    pages = int(used.sum()) + 8
    ids = list(rng.permutation(pages))
    foreign = ids[-8:]
    table, rows = rng.choice(foreign, (len(contexts), columns)), np.zeros(pages, int)
    for b, count in enumerate(used):
        mine = [ids.pop(0) for _ in range(count)]
        table[b, :count] = mine
        rows[mine] = np.clip(contexts[b] - size * np.arange(count), 0, size)

    @jax.jit
    def make(rows):
        shape = pages, 2, layout.kv_heads, size, layout.head_dim
        kv = jax.random.normal(jax.random.key(0), shape, BF16)
        inside = jnp.arange(size) < rows[:, None]
        kv = jnp.where(inside[:, None, None, :, None], kv, jnp.nan)
        return jnp.stack([jnp.full_like(kv, jnp.nan), kv]).reshape(2, pages, -1)

    return make(jnp.asarray(rows)), jnp.asarray(table, jnp.int32)


def at_the_end(pool: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same pages as the last ones of a pool of more than 2³² elements, and their numbers."""
    more = ceil_div(2**32, pool.shape[0] * pool.shape[2])
    grow = jax.jit(lambda x: jnp.pad(x, ((0, 0), (more, 0), (0, 0)), constant_values=jnp.nan))
    return grow(pool), numbers + more
