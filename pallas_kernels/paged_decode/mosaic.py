# SPDX-License-Identifier: Apache-2.0
"""`paged_decode` for Hopper: TMA gathers pages, wgmma multiplies, all of it at memory speed.

Everything is transposed: scores are `[keys, heads]` and the output is `[D, heads]`, so that the 64
rows that wgmma asks for are keys, or D, and the few query heads of a group are padded to 8 only.
"""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import tuned
from pallas_kernels.layout import PageLayout, ceil_div, round_up
from pallas_kernels.mosaic import ALIGN, COLUMNS, WGMMA, accumulator, iota, swizzled
from pallas_kernels.paged_decode.tuning import TUNING, Tuning

MAX_GROUP = 64  # query heads of a key/value head; more would not fit the registers
QUERIES = 2  # items whose queries are in shared memory at once


def paged_decode(
    q, pool, layer, page_table, context_len, *, layout: PageLayout, tuning: Tuning | None = None
):
    """See `pallas_kernels.paged_decode.paged_decode`.

    An item of work is one request and one key/value head, with all its query heads. Items are
    dealt out to the CTAs; a CTA's loads run ahead of its matmuls, across items too. Where requests
    and heads are too few to fill the GPU, an item is one of several parts of the context, and XLA
    adds the parts up.
    """
    tuning = tuning or tuned(TUNING)
    batch, heads, head_dim = q.shape
    group = heads // layout.kv_heads
    if group > MAX_GROUP:
        raise ValueError(f"at most {MAX_GROUP} query heads can share a key/value head, not {group}")
    if tuning.block_keys % layout.page_size:
        raise ValueError(
            f"page_size must divide {tuning.block_keys}, and {layout.page_size} doesn't"
        )
    # Query heads that an aligned copy must span to hold a group, wherever the group starts.
    window = round_up(group + ALIGN - math.gcd(group, ALIGN), ALIGN)
    padding = max(round_up(heads, ALIGN), window) - heads
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0)))
    # Indexed, never flattened: offsets in the pool exceed 32 bits.
    pages = pool.reshape(*pool.shape[:2], 2, layout.kv_heads, layout.page_size, head_dim)

    splits = _splits(batch * layout.kv_heads, page_table.shape[1] * layout.page_size, tuning)
    items = batch * layout.kv_heads * splits
    ctas = min(items, tuning.ctas)
    if items <= 4 * tuning.resident:
        tuning = replace(tuning, stages=tuning.few_stages)
    parts, part_dtype = (batch, layout.kv_heads, splits), q.dtype if splits == 1 else jnp.float32
    out_type = [jax.ShapeDtypeStruct((*parts, group, head_dim), part_dtype)]
    stages, block = tuning.stages, tuning.block_keys
    scratch = dict(
        q_smem=plgpu.SMEM((QUERIES, window, head_dim), q.dtype, transforms=swizzled()),
        kv_smem=plgpu.SMEM((2 * stages, block, head_dim), q.dtype, transforms=swizzled()),
        p_smem=plgpu.SMEM((window, block), q.dtype, transforms=swizzled()),
        out_smem=plgpu.SMEM((group, head_dim), part_dtype),
        q_ready=plgpu.Barrier(num_barriers=QUERIES),
        q_free=plgpu.Barrier(num_barriers=QUERIES),
        kv_ready=plgpu.Barrier(num_arrivals=block // layout.page_size, num_barriers=2 * stages),
        kv_free=plgpu.Barrier(num_barriers=2 * stages),
    )
    if splits > 1:
        out_type.append(jax.ShapeDtypeStruct((*parts, window), jnp.float32))
        scratch["mass_smem"] = plgpu.SMEM((window,), jnp.float32)
    out, *mass = plgpu.kernel(
        partial(_kernel, layout=layout, tuning=tuning, ctas=ctas, splits=splits),
        out_type=out_type,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )(q, pages, layer.reshape(1), page_table, context_len)
    if splits > 1:
        out = _sum_parts(out, *mass, rows=q.shape[1]).astype(q.dtype)
    return out.reshape(batch, heads, head_dim)


def _splits(items: int, most_keys: int, tuning: Tuning) -> int:
    """Parts of the context: a power of two, as many as the GPU has room for at once."""
    most = min(tuning.max_splits, tuning.resident // items, ceil_div(most_keys, tuning.block_keys))
    return 1 << max(most, 1).bit_length() - 1


def _sum_parts(out, mass, rows: int):
    """Parts of the context, `[B, K, splits, G, D]`, weighed by their share of the softmax."""
    group, window = out.shape[3], mass.shape[3]
    first = np.arange(out.shape[1]) * group
    place = first - _aligned(first, rows, window)  # of the group among the columns of `mass`
    columns = np.broadcast_to((place[:, None] + np.arange(group))[None, :, None], out.shape[:4])
    mass = jnp.take_along_axis(mass, columns, axis=3)
    most = jnp.maximum(mass.max(axis=2, keepdims=True), jnp.finfo(jnp.float32).min)
    weight = jnp.exp2(mass - most)
    weight /= jnp.maximum(weight.sum(axis=2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (out * weight[..., None]).sum(axis=2)


def _aligned(first: Any, rows: int, window: int) -> Any:
    """Where to read query heads from, of `rows`, to have those from `first` on."""
    xp = np if isinstance(first, np.ndarray) else jnp
    return xp.minimum(first - first % ALIGN, rows - window)


class _Item(NamedTuple):
    """A request and a key/value head, and what the CTA has to do of it."""

    request: jax.Array
    head: jax.Array
    split: jax.Array  # part of the context
    length: jax.Array  # of the context
    first: jax.Array  # the CTA's steps of `block_keys` keys: first ... last - 1
    last: jax.Array
    dealt: jax.Array  # items that the CTA had before
    done: jax.Array  # steps that those took

    def window(self, rows: int, window: int, group: int) -> tuple[jax.Array, jax.Array]:
        """Where to read the query heads from, of `rows`, and the group's place among them."""
        start = self.head * group
        aligned = _aligned(start, rows, window)
        return pl.multiple_of(aligned, ALIGN), start - aligned


def _kernel(q, pages, layer, table, context, out, *mass, layout, tuning, ctas, splits, **smem):
    """Body of one warpgroup; refs in GMEM, see `paged_decode` for their shapes."""
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
    items = q.shape[0] * layout.kv_heads * splits
    static = dict(rows=q.shape[1], group=out.shape[3], tuning=tuning)

    def each_item(body):
        """Calls `body` for each item; returns how many there were, and steps."""

        def one(dealt, done):
            index = cta + dealt * ctas
            split, index = lax.rem(index, jnp.int32(splits)), lax.div(index, jnp.int32(splits))
            head = lax.rem(index, jnp.int32(layout.kv_heads))
            request = lax.div(index, jnp.int32(layout.kv_heads))
            length = context[request]
            steps = lax.div(length + (tuning.block_keys - 1), jnp.int32(tuning.block_keys))
            first, last = jnp.int32(0), steps
            if splits > 1:
                first, last = (lax.div(steps * s, jnp.int32(splits)) for s in (split, split + 1))
            body(_Item(request, head, split, length, first, last, dealt, done))
            return done + last - first

        count = lax.div(items - cta + (ctas - 1), jnp.int32(ctas))
        return count, lax.fori_loop(0, count, one, jnp.int32(0))

    @pl.when(warpgroup == 0)
    def _():
        each_item(partial(_compute, out, mass, smem, **static))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        count, done = each_item(partial(_load, q, pages, layer, table, smem, **static))
        # Nobody may leave before the last phase of a barrier that he has waited for.
        for name, used in (("q_free", count), ("kv_free", 2 * done)):
            for slot in range(smem[name].shape[0]):

                @pl.when(slot < used)
                def _(name=name, slot=slot):
                    plgpu.barrier_wait(smem[name].at[slot])


def _load(q, pages, layer, table, smem, item, *, rows, group, tuning):
    """Copies the queries of an item, then its keys and values, step by step."""
    q_smem, kv_smem, ready, free = (smem[k] for k in ("q_smem", "kv_smem", "kv_ready", "kv_free"))
    stages, size, window = jnp.int32(tuning.stages), pages.shape[4], q_smem.shape[1]
    copies = tuning.block_keys // size

    def pages_of(step):
        """Read a step ahead: the table is as far away as the pages, and those wait for it."""
        numbers = [jnp.minimum(step * copies + c, table.shape[1] - 1) for c in range(copies)]
        return [table[item.request, number] for number in numbers]

    page = pages_of(item.first)
    layer_index = layer[0]
    slot = lax.rem(item.dealt, jnp.int32(QUERIES))

    @pl.when(item.dealt >= QUERIES)
    def _():
        plgpu.barrier_wait(smem["q_free"].at[slot])

    start, _ = item.window(rows, window, group)
    plgpu.copy_gmem_to_smem(
        q.at[item.request, pl.ds(start, window)], q_smem.at[slot], smem["q_ready"].at[slot]
    )

    def load(step, page):
        turn = item.done + step - item.first
        next_page = pages_of(step + 1)
        begin = [(step * copies + c) * size for c in range(copies)]
        for keys_or_values in (0, 1):
            slot = 2 * lax.rem(turn, stages) + keys_or_values

            @pl.when(turn >= stages)
            def _(slot=slot):
                plgpu.barrier_wait(free.at[slot])

            for c in range(copies):

                @pl.when(begin[c] < item.length)
                def _(c=c, slot=slot, keys_or_values=keys_or_values):
                    plgpu.copy_gmem_to_smem(
                        pages.at[layer_index, page[c], keys_or_values, item.head],
                        kv_smem.at[slot, pl.ds(c * size, size)],
                        ready.at[slot],
                    )

                @pl.when(begin[c] >= item.length)
                def _(slot=slot):
                    plgpu.barrier_arrive(ready.at[slot])

        return next_page

    lax.fori_loop(item.first, item.last, load, page)


def _compute(out, mass, smem, item, *, rows, group, tuning):
    """Attention of an item's query heads over its part of the context."""
    q_smem, kv_smem, p_smem = (smem[k] for k in ("q_smem", "kv_smem", "p_smem"))
    ready, free = smem["kv_ready"], smem["kv_free"]
    keys, stages, depth = tuning.block_keys, jnp.int32(tuning.stages), kv_smem.shape[2]
    window, dtype, tiny = p_smem.shape[0], q_smem.dtype, jnp.finfo(jnp.float32).tiny
    scale = math.log2(math.e) / math.sqrt(depth)  # exp2 is the instruction that the GPU has
    q_slot = lax.rem(item.dealt, jnp.int32(QUERIES))
    _, place = item.window(rows, window, group)

    def wide(x, like):
        return lax.broadcast_in_dim(x, like.shape, [1])

    def step_(step, carry):
        acc, top, total = carry
        slot = 2 * lax.rem(item.done + step - item.first, stages)
        left = item.length - step * keys

        def multiply_keys(scores):
            plgpu.wgmma(scores, kv_smem.at[slot], q_smem.at[q_slot].transpose((1, 0)))
            return scores[...]

        def multiply_values(product):
            values = kv_smem.at[slot + 1].transpose((1, 0))
            plgpu.wgmma(product, values, p_smem.transpose((1, 0)))
            return product[...]

        plgpu.barrier_wait(ready.at[slot])
        scores = pl.run_scoped(multiply_keys, accumulator(keys, window))
        plgpu.barrier_arrive(free.at[slot])
        key = iota(keys, window, 0)
        scores = jnp.where(key < left, scores * scale, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - wide(new_top, scores))
        p_smem.transpose((1, 0))[...] = weights.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(ready.at[slot + 1])

        @pl.when(left < keys)
        def _():
            _zero_rows(kv_smem.at[slot + 1], left)

        product = pl.run_scoped(multiply_values, accumulator(depth, window))
        plgpu.barrier_arrive(free.at[slot + 1])
        return acc * wide(shrink, acc) + product, new_top, total * wide(shrink, total) + weights

    start = (
        plgpu.layout_cast(jnp.zeros((depth, window), jnp.float32), WGMMA),
        plgpu.layout_cast(jnp.full((window,), -jnp.inf, jnp.float32), COLUMNS),
        plgpu.layout_cast(jnp.zeros((keys, window), jnp.float32), WGMMA),
    )
    plgpu.barrier_wait(smem["q_ready"].at[q_slot])
    acc, top, total = lax.fori_loop(item.first, item.last, step_, start)
    plgpu.barrier_arrive(smem["q_free"].at[q_slot])
    total = total.sum(axis=0)
    acc *= wide(1 / jnp.maximum(total, tiny), acc)  # without keys 0, not 0 / 0
    column = iota(depth, window, 1)
    out_smem, where = smem["out_smem"], (item.request, item.head, item.split)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left `out_smem`

    @pl.loop(0, group)
    def _(g):
        out_smem[g] = jnp.where(column == place + g, acc, 0).sum(axis=1).astype(out.dtype)

    for mass_gmem in mass:  # only where the context has parts
        smem["mass_smem"][...] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["mass_smem"], mass_gmem.at[where])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out.at[where])


def _zero_rows(matrix, first):
    """Zeroes rows first, ... of a matrix in SMEM: they weigh 0, but 0 times NaN is NaN."""
    row = iota(64, 64, 0)
    for r, c in itertools.product(*(range(0, n, 64) for n in matrix.shape)):
        part = matrix.at[pl.ds(r, 64), pl.ds(c, 64)]
        part[...] = jnp.where(row + r < first, part[...], 0)
    plgpu.commit_smem()
