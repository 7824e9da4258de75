# SPDX-License-Identifier: Apache-2.0
"""How kernels of `paged_prefill` share the work, found on the device from a step's lengths.

It depends on the step alone, not on the layer: XLA computes it once for all layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import ceil_div

ALIGN = 8  # rows of a swizzled tile: TMA reads into one from multiples of it


class Item(NamedTuple):
    """A line of `work_items`."""

    first: Array  # token of the block's first row, a multiple of `ALIGN`
    start: Array  # rows start ... stop - 1 of the block belong to the run
    stop: Array
    position: Array  # of the first row in the request's context
    keys: Array  # that the last row sees; 0 for tokens that no request owns
    context: Array  # length
    request: Array


def apart(
    decode: Callable[..., Array],
    prefill: Callable[..., Array],
    q: Float[Array, "T H D"],
    pool: Float[Array, "L P elems"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B N"],
    query_start: Int[Array, " B"],
    query_len: Int[Array, " B"],
    context_len: Int[Array, " B"],
) -> Float[Array, "T H D"]:
    """Single tokens by `paged_decode`'s kernel: in a block of queries each would be alone.

    Args:
        decode: takes what `paged_decode` takes.
        prefill: takes the same as this; requests of single tokens have no queries.
    """
    where, single = (pool, layer, page_table), query_len == 1
    queries = q.at[query_start].get(mode="clip")
    singles = decode(queries, *where, jnp.where(single, context_len, 0))
    out = prefill(q, *where, query_start, jnp.where(single, 0, query_len), context_len)
    row = jnp.arange(len(single))  # beside the array, each in a place of its own, are the others
    at = jnp.where(single, query_start, len(q) + row)
    return out.at[at].set(singles, mode="drop", unique_indices=True)


def work_items(
    query_start: Int[Array, " B"],
    query_len: Int[Array, " B"],
    context_len: Int[Array, " B"],
    *,
    tokens: int,
    block: int,
) -> tuple[Int[Array, "items 7"], Int[Array, "1"]]:
    """The blocks of tokens to work on, longest context first, and how many there are.

    Every token is in one block: the runs of tokens that no request owns are blocks too, of no keys.

    Returns:
        One `Item` a line, and how many there are.
    """
    batch = query_len.shape[0]
    end = query_start + query_len
    start = jnp.where(query_len > 0, query_start, tokens)
    # A gap begins where a request ends, or at 0, and ends where the next request starts.
    begin = jnp.append(end, 0)
    until = jnp.where(start >= begin[:, None], start, tokens).min(axis=1)
    gap = jnp.where(jnp.append(query_len, 1) > 0, until - begin, 0)

    first, length = jnp.concatenate([query_start, begin]), jnp.concatenate([query_len, gap])
    lead = first % ALIGN
    blocks = jnp.where(length > 0, ceil_div(lead + length, block), 0)
    ends = jnp.cumsum(blocks)
    runs = length.shape[0]
    item = jnp.arange(ceil_div(tokens + runs * (block + ALIGN), block))
    run = jnp.minimum((ends <= item[:, None]).sum(axis=1), runs - 1)
    request = jnp.minimum(run, batch - 1)
    done = (item - (ends - blocks)[run]) * block  # since the aligned beginning of the run
    start = jnp.maximum(lead[run] - done, 0)
    stop = jnp.minimum(lead[run] + length[run] - done, block)
    context = context_len[request]
    position = context - query_len[request] - lead[run] + done
    keys = jnp.where(run < batch, position + stop, 0)
    keys = jnp.where(item < ends[-1], keys, -1)  # items past the last sort behind all
    fields = (first - lead)[run] + done, start, stop, position, keys, context, request
    order = jnp.argsort(-keys)
    return jnp.stack(fields, axis=1)[order].astype(jnp.int32), ends[-1:].astype(jnp.int32)
