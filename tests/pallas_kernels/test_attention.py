# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the attention operations."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_decode, paged_prefill
from pallas_kernels.layout import ceil_div

LAYER, GROUP = 1, 3  # query heads of a key/value head


def fill(pages, contexts):
    """Requests with random keys and values in pages; NaN past their ends. Returns k, v, table."""
    layout = pages.layout
    columns = max(ceil_div(n, layout.page_size) for n in contexts) + 2
    table = np.zeros((len(contexts), columns), np.int32)
    keys, values = [], []
    for b, length in enumerate(contexts):
        table[b] = pages.take(columns)  # entries past the context are foreign pages, full of NaN
        k, v = pages.rng.standard_normal((2, length, layout.kv_heads, layout.head_dim))
        for t in range(length):
            page, row = table[b, t // layout.page_size], t % layout.page_size
            pages.write_kv(LAYER, page, row, k[t], v[t])
        keys.append(k)
        values.append(v)
    return keys, values, table


def expected(q, k, v, position):
    """Attention of one query [H, D] over tokens 0 … position, in float64."""
    out = np.zeros(q.shape)
    for h in range(q.shape[0]):
        kh, vh = k[: position + 1, h // GROUP], v[: position + 1, h // GROUP]
        scores = kh @ q[h] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[h] = weights @ vh / weights.sum()
    return out


@pytest.mark.parametrize("contexts", [[1], [16, 17, 0, 1, 47], [64, 15, 33]])
def test_decode(pages, contexts):
    layout = pages.layout
    keys, values, table = fill(pages, contexts)
    heads = GROUP * layout.kv_heads
    q = pages.rng.standard_normal((len(contexts), heads, layout.head_dim)).astype(np.float32)
    got = paged_decode(
        jnp.asarray(q),
        jnp.asarray(pages.pool),
        jnp.int32(LAYER),
        jnp.asarray(table),
        jnp.asarray(contexts, jnp.int32),
        layout=layout,
    )
    for b, length in enumerate(contexts):
        want = expected(q[b], keys[b], values[b], length - 1) if length else np.zeros(q[b].shape)
        np.testing.assert_allclose(got[b], want, atol=2e-5)


@pytest.mark.parametrize(
    ("contexts", "queries"),
    [([1], [1]), ([40, 17, 5, 0, 33], [40, 1, 3, 0, 18]), ([31, 64], [16, 1])],
)
def test_prefill(pages, contexts, queries):
    layout = pages.layout
    keys, values, table = fill(pages, contexts)
    tokens = sum(queries) + 5  # the last five are padding
    starts = np.cumsum([0, *queries[:-1]])
    heads = GROUP * layout.kv_heads
    q = pages.rng.standard_normal((tokens, heads, layout.head_dim)).astype(np.float32)
    ints = (jnp.asarray(x, jnp.int32) for x in (table, starts, queries, contexts))
    got = paged_prefill(
        jnp.asarray(q), jnp.asarray(pages.pool), jnp.int32(LAYER), *ints, layout=layout
    )
    want = np.zeros(q.shape)
    for b, (context, length) in enumerate(zip(contexts, queries, strict=True)):
        for i in range(length):
            t = starts[b] + i
            want[t] = expected(q[t], keys[b], values[b], context - length + i)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_shapes_are_checked_while_testing(pages):
    pytest.importorskip("beartype")
    q = jnp.zeros((2, GROUP * pages.layout.kv_heads, pages.layout.head_dim))
    table, lengths = jnp.zeros((2, 4), jnp.int32), jnp.ones(3, jnp.int32)  # three for two requests
    with pytest.raises(Exception, match="context_len"):
        paged_decode(
            q, jnp.asarray(pages.pool), jnp.int32(LAYER), table, lengths, layout=pages.layout
        )
