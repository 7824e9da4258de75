# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the attention operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_decode, paged_prefill
from pallas_kernels.layout import PageLayout, ceil_div
from tests.pallas_kernels.pages import LAYOUTS, assert_close, rounded

LAYER = 1
SLOW = pytest.mark.long_in_mosaics_interpreter
ATTENTION_LAYOUTS = {
    "llama": LAYOUTS["llama"],
    "padded": LAYOUTS["padded"],
    "one head": PageLayout(kv_heads=1, head_dim=128, page_size=32),
}


@pytest.fixture(params=ATTENTION_LAYOUTS.values(), ids=ATTENTION_LAYOUTS.keys())
def layout(request) -> PageLayout:
    return request.param


def fill(pages, contexts):
    """Requests with random keys and values in pages; NaN past their ends. Returns k, v, table."""
    layout = pages.layout
    columns = max(ceil_div(n, layout.page_size) for n in contexts) + 2
    table = np.zeros((len(contexts), columns), np.int32)
    keys, values = [], []
    for b, length in enumerate(contexts):
        table[b] = pages.take(columns)  # entries past the context are foreign pages, full of NaN
        shape = 2, length, layout.kv_heads, layout.head_dim
        k, v = rounded(pages.rng.standard_normal(shape))
        for t in range(length):
            page, row = table[b, t // layout.page_size], t % layout.page_size
            pages.write_kv(LAYER, page, row, k[t], v[t])
        keys.append(k)
        values.append(v)
    return keys, values, table


def queries(pages, tokens, group):
    shape = tokens, group * pages.layout.kv_heads, pages.layout.head_dim
    return rounded(pages.rng.standard_normal(shape))


def expected(q, k, v, position):
    """Attention of one query [H, D] over tokens 0 … position, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[0] // k.shape[1]
    for h in range(q.shape[0]):
        kh, vh = (x[: position + 1, h // group].astype(np.float64) for x in (k, v))
        scores = kh @ q[h] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[h] = weights @ vh / weights.sum()
    return out


@pytest.mark.parametrize(
    ("contexts", "group"),
    [([1], 3), ([16, 17, 0, 1, 47], 1), ([64, 15, 33], 8), ([300, 0, 65], 3)],
    ids=str,
)
def test_decode(pages, backend, dtype, contexts, group):
    keys, values, table = fill(pages, contexts)
    q = queries(pages, len(contexts), group)
    got = jax.jit(partial(paged_decode, layout=pages.layout, backend=backend))(
        jnp.asarray(q, dtype),
        jnp.asarray(pages.pool, dtype),
        jnp.int32(LAYER),
        jnp.asarray(table),
        jnp.asarray(contexts, jnp.int32),
    )
    want = np.zeros(q.shape)
    for b, length in enumerate(contexts):
        if length:
            want[b] = expected(q[b], keys[b], values[b], length - 1)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("contexts", "lengths", "group"),
    [
        ([1], [1], 3),
        ([40, 17, 5, 0, 33], [40, 1, 3, 0, 18], 1),
        pytest.param([31, 64], [16, 1], 8, marks=SLOW),
        pytest.param([200, 70, 1], [60, 9, 1], 4, marks=SLOW),
    ],
    ids=str,
)
def test_prefill(pages, backend, dtype, contexts, lengths, group):
    keys, values, table = fill(pages, contexts)
    tokens = sum(lengths) + 5  # the last five are padding
    starts = np.cumsum([0, *lengths[:-1]])
    q = queries(pages, tokens, group)
    ints = (jnp.asarray(x, jnp.int32) for x in (table, starts, lengths, contexts))
    got = jax.jit(partial(paged_prefill, layout=pages.layout, backend=backend))(
        jnp.asarray(q, dtype), jnp.asarray(pages.pool, dtype), jnp.int32(LAYER), *ints
    )
    want = np.zeros(q.shape)
    for b, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        for i in range(length):
            t = starts[b] + i
            want[t] = expected(q[t], keys[b], values[b], context - length + i)
    assert_close(got, want)


def test_prefill_of_requests_in_any_order(pages, backend, dtype):
    """Gaps between requests are nobody's tokens: they are 0 as well."""
    contexts, lengths, starts = [20, 9, 33], [7, 9, 2], [21, 3, 12]
    keys, values, table = fill(pages, contexts)
    q = queries(pages, 32, 2)
    ints = (jnp.asarray(x, jnp.int32) for x in (table, starts, lengths, contexts))
    got = jax.jit(partial(paged_prefill, layout=pages.layout, backend=backend))(
        jnp.asarray(q, dtype), jnp.asarray(pages.pool, dtype), jnp.int32(LAYER), *ints
    )
    want = np.zeros(q.shape)
    for b, (context, length, start) in enumerate(zip(contexts, lengths, starts, strict=True)):
        for i in range(length):
            want[start + i] = expected(q[start + i], keys[b], values[b], context - length + i)
    assert_close(got, want)


def test_shapes_are_checked_while_testing(pages):
    pytest.importorskip("beartype")
    q = jnp.zeros((2, pages.layout.kv_heads, pages.layout.head_dim))
    table, lengths = jnp.zeros((2, 4), jnp.int32), jnp.ones(3, jnp.int32)  # three for two requests
    with pytest.raises(Exception, match="context_len"):
        paged_decode(
            q, jnp.asarray(pages.pool), jnp.int32(LAYER), table, lengths, layout=pages.layout
        )
