# SPDX-License-Identifier: Apache-2.0
"""`paged_prefill` for Hopper: TMA gathers pages, wgmma multiplies, each hides behind the other."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import interpreted, tuned
from pallas_kernels.layout import PageLayout
from pallas_kernels.mosaic import WGMMA, accumulator, swizzled
from pallas_kernels.paged_decode.mosaic import paged_decode
from pallas_kernels.paged_prefill.items import ALIGN, Item, apart, work_items
from pallas_kernels.paged_prefill.tuning import TUNING, Tuning

ROWS = 64  # of a wgmma, and so of a warpgroup's share of an item


def paged_prefill(
    q,
    pool,
    layer,
    page_table,
    query_start,
    query_len,
    context_len,
    *,
    layout: PageLayout,
    tuning: Tuning | None = None,
):
    """See `pallas_kernels.paged_prefill.paged_prefill`.

    An item of work is a block of consecutive tokens of one request and one key/value head,
    with all its query heads: keys and values are read once for the group. The row of a warpgroup's
    tile is `tokens * g + t` for head g of the group and token t. Items are sorted by length and
    dealt out to the CTAs; a CTA's loads run ahead of its matmuls, across items too.
    """
    decode = partial(paged_decode, layout=layout)
    prefill = partial(_prefill, layout=layout, tuning=tuning or tuned(TUNING))
    spans = query_start, query_len, context_len
    return apart(decode, prefill, q, pool, layer, page_table, *spans)


def _prefill(
    q, pool, layer, page_table, query_start, query_len, context_len, *, layout, tuning: Tuning
):
    """Of all who have queries."""
    tokens, heads, head_dim = q.shape
    q = jnp.pad(q, ((0, -tokens % ALIGN), (0, 0), (0, 0)))  # as it is, but in tiny tests
    tile = 1 << (ROWS * layout.kv_heads // heads).bit_length() - 1  # tokens of a warpgroup's tile
    items, count = work_items(
        query_start, query_len, context_len, tokens=tokens, block=tile * tuning.warpgroups
    )
    pages = pool.reshape(
        *pool.shape[:2], 2, layout.kv_heads, layout.page_size, layout.head_dim
    )  # indexed, never flattened: offsets in the pool exceed 32 bits
    body = partial(_kernel, tile=tile, layout=layout, tuning=tuning, interpret=interpreted())
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, heads, head_dim), q.dtype),
        grid=(tuning.ctas,),
        grid_names=("cta",),
        num_threads=tuning.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )(q, pages, layer[None], page_table, items, count)


def _kernel(q, pages, layer, table, items, count, out, *, tile, layout, tuning, interpret):
    """Body of one warpgroup; refs in GMEM, see `paged_prefill` for their shapes."""
    dtype, depth = q.dtype, layout.head_dim
    computing, ring, keys = tuning.warpgroups, tuning.ring, tuning.block_keys
    group = q.shape[1] // layout.kv_heads
    copies = keys // layout.page_size
    scratch = dict(
        q_smem=plgpu.SMEM((computing, ROWS, depth), dtype, transforms=swizzled()),
        kv_smem=plgpu.SMEM((ring, keys, depth), dtype, transforms=swizzled()),
        out_smem=plgpu.SMEM((computing, ROWS, depth), dtype),
        q_ready=plgpu.Barrier(num_arrivals=computing * group),
        kv_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=ring + 1),
        q_free=plgpu.Barrier(num_arrivals=computing),
        kv_free=plgpu.Barrier(num_arrivals=computing, num_barriers=ring),
    )
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((computing, ROWS, keys), dtype, transforms=swizzled())

    def scoped(**smem):
        warpgroup = lax.axis_index("warpgroup")
        each_item = partial(_each_item, items, count, heads=layout.kv_heads, ctas=tuning.ctas)
        # Free to begin with, and again in the end: the loader may always wait for them.
        free = [smem["q_free"], *(smem["kv_free"].at[slot] for slot in range(ring))]
        static = dict(tile=tile, group=group, layout=layout, tuning=tuning)

        @pl.when(warpgroup == computing)
        def load():
            plgpu.set_max_registers(tuning.load_registers, action="decrease")
            each_item(partial(_load, q, pages, layer[0], table, smem, **static))
            for barrier in free:
                plgpu.barrier_wait(barrier)

        @pl.when(warpgroup < computing)
        def compute():
            plgpu.set_max_registers(tuning.compute_registers, action="increase")
            for barrier in free:
                plgpu.barrier_arrive(barrier)
            each_item(partial(_compute, out, smem, warpgroup, **static))
            plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(scoped, **scratch, collective_axes="warpgroup")


def _each_item(items, count, body, *, heads, ctas):
    """Calls `body(item, head, steps before it)` for each item of this CTA; it returns its steps.

    The items are dealt out back and forth, so that nobody always gets the longer ones.
    """
    cta = lax.axis_index("cta")
    work = count[0] * heads

    def place(dealt):
        return dealt * ctas + jnp.where(dealt & 1, ctas - 1 - cta, cta)

    rounds = lax.div(work, jnp.int32(ctas))
    rounds += (place(rounds) < work).astype(jnp.int32)

    def one(dealt, steps):
        at = place(dealt)
        index, head = lax.div(at, jnp.int32(heads)), lax.rem(at, jnp.int32(heads))
        item = Item(*(items[index, field] for field in range(items.shape[1])))
        return steps + body(item, head, steps)

    lax.fori_loop(0, rounds, one, jnp.int32(0))


def _load(q, pages, layer, table, smem, item, head, steps, *, tile, group, layout, tuning):
    """Copies the queries of an item, then its keys and values, step by step."""
    plgpu.barrier_wait(smem["q_free"])
    for w in range(tuning.warpgroups):
        for g in range(group):
            # What lies past the item is some neighbour's, or nothing: it is not stored.
            plgpu.copy_gmem_to_smem(
                q.at[pl.ds(pl.multiple_of(item.first + w * tile, ALIGN), tile), head * group + g],
                smem["q_smem"].at[w, pl.ds(g * tile, tile)],
                smem["q_ready"],
            )

    size, keys, ring = layout.page_size, tuning.block_keys, tuning.ring
    copies = keys // size
    last = lax.div(item.keys - 1, jnp.int32(size))
    count = lax.div(item.keys + (keys - 1), jnp.int32(keys))
    # Values past the context have weight 0, but 0 times NaN is NaN: they must be zeroed.
    unclean = count * keys > item.context

    @pl.loop(0, 2 * count)
    def _(tile):
        slot = lax.rem(2 * steps + tile, jnp.int32(ring))
        hold = unclean & (tile == 2 * count - 1)
        ready = smem["kv_ready"].at[jnp.where(hold, ring, slot)]
        # The table holds nothing of ours past the last page: that one comes again, and is masked.
        column = lax.div(tile, jnp.int32(2)) * copies
        page = [table[item.request, jnp.minimum(column + c, last)] for c in range(copies)]
        plgpu.barrier_wait(smem["kv_free"].at[slot])
        for c in range(copies):
            plgpu.copy_gmem_to_smem(
                pages.at[layer, page[c], lax.rem(tile, jnp.int32(2)), head],
                smem["kv_smem"].at[slot, pl.ds(c * size, size)],
                ready,
            )

    @pl.when(unclean)
    def _():
        slot = lax.rem(2 * (steps + count) - 1, jnp.int32(ring))
        plgpu.barrier_wait(smem["kv_ready"].at[ring])
        for r in range(0, keys, ROWS):
            end = item.context - (count - 1) * keys - r

            @pl.when(end < ROWS)
            def _(r=r, end=end):
                for c in range(0, layout.head_dim, 64):
                    part = smem["kv_smem"].at[slot, pl.ds(r, ROWS), pl.ds(c, 64)]
                    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=WGMMA)
                    part[...] = jnp.where(row < end, part[...], 0)

        plgpu.commit_smem()
        for _copy in range(copies):
            plgpu.barrier_arrive(smem["kv_ready"].at[slot])

    return count


def _compute(out, smem, warpgroup, item, head, steps, *, tile, group, layout, tuning):
    """Attention of one warpgroup's rows of an item."""
    keys, ring = tuning.block_keys, tuning.ring
    depth, dtype = layout.head_dim, out.dtype
    scale = math.log2(math.e) / math.sqrt(depth)  # exp2 is the instruction that the GPU has
    count = lax.div(item.keys + (keys - 1), jnp.int32(keys))
    q_smem, out_smem = smem["q_smem"].at[warpgroup], smem["out_smem"].at[warpgroup]
    plgpu.barrier_wait(smem["q_ready"])

    def slot(step, which):
        """Where keys (0) or values (1) of a step lie in the ring."""
        return lax.rem(2 * (steps + step) + which, jnp.int32(ring))

    def rows(x, shape):
        return lax.broadcast_in_dim(x, shape, [0])

    def multiply_keys(scores, step):
        plgpu.wgmma(scores, q_smem, smem["kv_smem"].at[slot(step, 0)].transpose((1, 0)))

    def multiply_values(acc, weights, step):
        """acc += P V, where P is in registers, or in shared memory when interpreting."""
        if "p_smem" in smem:
            p_smem = smem["p_smem"].at[warpgroup]
            p_smem[...] = weights
            plgpu.commit_smem()
            weights = p_smem
        plgpu.wgmma(acc, weights, smem["kv_smem"].at[slot(step, 1)])

    def mask(scores, step):
        token = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1)) & (tile - 1)
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
        position = token + item.position + warpgroup * tile - step * keys
        # key <= position, written so that a constant stands on the left: bits 1 and 2 of the column
        # are the lane's in this layout, and 64 different sums in registers would spill.
        visible = (key & ~6) <= rows(position, scores.shape) - (key & 6)
        return jnp.where(visible, scores, -jnp.inf)

    def softmax(scores, old):
        """P = exp2(scale scores - top), the rows' maxima so far times the scale, P's row sums."""
        top = scores.max(axis=1) * scale
        if old is not None:
            top = jnp.maximum(top, old)
        weights = jnp.exp2(scores * scale - rows(top, scores.shape))
        return weights, top, weights.sum(axis=1)

    def later(step, carry, masked):
        """Multiplies the keys of a step, and the values of the step before beside its softmax."""
        weights, acc, top, total = carry
        plgpu.barrier_wait(smem["kv_ready"].at[slot(step, 0)])
        plgpu.barrier_wait(smem["kv_ready"].at[slot(step - 1, 1)])

        def products(scores_ref, acc_ref):
            if "p_smem" not in smem:
                acc_ref[...] = acc
            multiply_keys(scores_ref, step)
            multiply_values(acc_ref, weights, step - 1)
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            scores = lax.optimization_barrier(scores)
            plgpu.barrier_arrive(smem["kv_free"].at[slot(step, 0)])
            if masked:
                scores = mask(scores, step)
            p, new_top, new_total = softmax(scores, top)
            new = acc_ref[...]
            new, p = lax.optimization_barrier((new, p))
            p16 = p.astype(dtype)
            if "p_smem" in smem:
                new = acc + new
            plgpu.barrier_arrive(smem["kv_free"].at[slot(step - 1, 1)])
            shrink = jnp.exp2(top - new_top)
            return p16, new * rows(shrink, new.shape), new_top, total * shrink + new_total

        return pl.run_scoped(
            products,
            accumulator(ROWS, keys),
            accumulator(ROWS, depth),
        )

    def attended():
        plgpu.barrier_wait(smem["kv_ready"].at[slot(0, 0)])

        def first(scores_ref):
            multiply_keys(scores_ref, 0)
            return scores_ref[...]

        scores = mask(pl.run_scoped(first, accumulator(ROWS, keys)), 0)
        plgpu.barrier_arrive(smem["kv_free"].at[slot(0, 0)])
        p, top, total = softmax(scores, None)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, depth), jnp.float32), WGMMA)
        carry = p.astype(dtype), acc, top, total
        whole = jnp.clip(lax.div(item.position + 1, jnp.int32(keys)), 1, count)
        carry = lax.fori_loop(1, whole, partial(later, masked=False), carry)
        carry = lax.fori_loop(whole, count, partial(later, masked=True), carry)
        weights, acc, top, total = carry
        plgpu.barrier_arrive(smem["q_free"])
        plgpu.barrier_wait(smem["kv_ready"].at[slot(count - 1, 1)])

        def last(acc_ref):
            if "p_smem" not in smem:
                acc_ref[...] = acc
            multiply_values(acc_ref, weights, count - 1)
            return acc_ref[...]

        new = pl.run_scoped(last, accumulator(ROWS, depth))
        if "p_smem" in smem:
            new = acc + new
        plgpu.barrier_arrive(smem["kv_free"].at[slot(count - 1, 1)])
        return (new * rows(1 / total, new.shape)).astype(dtype)

    def nothing():
        plgpu.barrier_arrive(smem["q_free"])
        return plgpu.layout_cast(jnp.zeros((ROWS, depth), dtype), WGMMA)

    result = lax.cond(item.keys > 0, attended, nothing)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    out_smem[...] = result
    plgpu.commit_smem()
    begin, end = (jnp.clip(at - warpgroup * tile, 0, tile) for at in (item.start, item.stop))
    mine = end - begin
    size = tile
    while size:

        @pl.when(mine & size != 0)
        def _(begin=begin, size=size):
            @pl.loop(0, group)
            def _(g):
                plgpu.copy_smem_to_gmem(
                    out_smem.at[pl.ds(g * tile + begin, size)],
                    out.at[pl.ds(item.first + warpgroup * tile + begin, size), head * group + g],
                )

        begin += mine & size
        size //= 2
    return count
