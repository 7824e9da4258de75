# SPDX-License-Identifier: Apache-2.0
"""LoRA of single tokens over paged adapters: shrink, expand and add in one Mosaic GPU kernel.

Or one half of that alone, where h is to cross devices in between. The gather form, for decode:
every token reads its own adapter's A and B once, which is all the time there is. The CTAs of a
cluster do one module of one token: each multiplies its share of A's columns and, once they have
told each other their sums, its share of B's outputs. A CTA's loader runs ahead, through A and on
into B.

The tensor cores work on tiles as they lie in the pool (`layout.py`), by leaving most of each
product unused.
    Shrink: a tile `[(j, i), 64]` times x `[j', 64]`ᵀ holds rank i's partial sum of column group j
    where j = j'. The rest is masked and the sum over j taken at the end.
    Expand: a tile transposed, `[64, (j', i)]`, times h spread out as `[(j', i), j]`, zero where
    j ≠ j', gives 64 outputs of each of 8 groups.
h stays float32: as a tensor-core operand it is two numbers of the model's dtype, high and low.

A half alone has the same loads and products, but needs no cluster: what the CTAs of a module would
tell each other is written to memory for XLA to add up, or has been added up and is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import interpreted
from pallas_kernels.layout import SLAB_RANKS, TILE, TILE_COLUMNS, PageLayout, ceil_div
from pallas_kernels.lora_tiles import GROUPS, tile_rows, tiled_pool
from pallas_kernels.mosaic import WGMMA, accumulator, choose, iota, store, swizzled
from pallas_kernels.segments import PAGES_AT_HAND, Modules, Work

MOST_TILES = 32  # of outputs in a CTA's shared memory, 1 KiB each, if a cluster can share them so
HELD_TILES = 8  # of outputs that a CTA sums in registers at a time: 8 registers a tile
ROUND = 8  # slabs whose sums the CTAs of a cluster exchange at a time: a column each
CLUSTERS = (1, 2, 4, 8)  # CTAs of a portable cluster


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the kernel.

    Attributes:
        ctas: most CTAs among which modules are shared: those that the GPU runs at once.
        most_parts: most CTAs that share a token's module, unless its outputs need more.
        stages: copies of adapter tiles that a CTA has in flight.
        copy_tiles: tiles of a copy, where the layout allows.
    """

    ctas: int
    most_parts: int
    stages: int
    copy_tiles: int = 2


def lora_gather(
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: Tuning,
) -> jax.Array:
    """`y + s · (x Aᵀ) Bᵀ`; of single tokens, in place."""
    static = {"modules": modules, "max_rank": max_rank, "layout": layout, "tuning": tuning}
    return _gather(x, None, y, pool, layer, work, pages, **static)


def gather_shrink(
    x: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: Tuning,
) -> jax.Array:
    """`x Aᵀ` of single tokens.

    Returns:
        `[T, M, R]`, float32. Slabs past a module's rank, and all of a token that has no adapter,
        hold anything, NaN as well.
    """
    static = {"modules": modules, "max_rank": max_rank, "layout": layout, "tuning": tuning}
    sums = _gather(x, None, None, pool, layer, work, pages, **static)
    tokens, count, parts, rounds = sums.shape[:4]
    sums = sums.reshape(tokens, count, parts, rounds, GROUPS, SLAB_RANKS, ROUND).sum((2, 4))
    return sums.swapaxes(3, 4).reshape(tokens, count, -1)[:, :, :max_rank]


def gather_expand(
    y: jax.Array,
    h: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    layout: PageLayout,
    tuning: Tuning,
) -> jax.Array:
    """`y + s · h Bᵀ` of single tokens.

    Args:
        h: `[T, M, R]`, float32; of tokens that have no adapter it is not read.
    """
    tokens, count, max_rank = h.shape
    rounds = ceil_div(max_rank, ROUND * SLAB_RANKS)
    h = jnp.pad(h, ((0, 0), (0, 0), (0, rounds * ROUND * SLAB_RANKS - max_rank)))
    h = h.reshape(tokens, count, rounds, 1, ROUND, SLAB_RANKS).swapaxes(4, 5)
    h = jnp.broadcast_to(h, (tokens, count, rounds, GROUPS, SLAB_RANKS, ROUND))
    h = h.reshape(tokens, count, rounds, TILE, ROUND)
    static = {"modules": modules, "max_rank": max_rank, "layout": layout, "tuning": tuning}
    return _gather(None, h, y, pool, layer, work, pages, **static)


def _gather(
    x: jax.Array | None,
    h: jax.Array | None,
    y: jax.Array | None,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: Tuning,
) -> jax.Array:
    """Both halves, of x and y; without y the first alone, and of h instead of x the second.

    Args:
        h: `[T, M, rounds, (j, i), slab]`: rank i of each slab of a round, for every j alike.

    Returns:
        y with the delta; without y `[T, M, parts, rounds, (j, i), slab]`: what each CTA has found
        for rank i of column group j. Rounds without a slab are not written.
    """
    shrinks, expands = x is not None, y is not None
    whole = shrinks and expands
    dtype, layers = pool.dtype, pool.shape[0]
    most_slabs = ceil_div(max_rank, SLAB_RANKS)
    line = jnp.int32(layers) if layer is None else layer
    stages, blocks = tuning.stages, work.lines.shape[2]
    # A half alone must not know the other's widths: there may be no such matrix.
    widths = (modules.inputs,) * shrinks + modules.outputs * expands
    unit = min(tuning.copy_tiles, layout.copy_tiles, *map(layout.slab_tiles, widths))

    def copies_of(columns: int) -> int:  # of a slab
        return ceil_div(ceil_div(columns, TILE_COLUMNS), unit)

    a_copies = copies_of(modules.inputs) if shrinks else 0
    b_copies = [copies_of(n) if expands else 0 for n in modules.outputs]
    parts = max(tuning.ctas // (blocks * modules.count), 1)
    parts = min(parts, tuning.most_parts, max(a_copies, *b_copies))
    parts = max(parts, ceil_div(max(b_copies) * unit, MOST_TILES))
    if whole:
        parts = next((n for n in CLUSTERS if n >= parts), max(CLUSTERS))
    # The interpreter knows no stores into another CTA's memory: there, each multiplies all of A.
    exchange = whole and parts > 1 and not interpreted()
    divided = exchange or not whole
    a_share = ceil_div(a_copies, parts) if divided else a_copies
    b_shares = [ceil_div(n, parts) for n in b_copies]
    held = max(min(HELD_TILES // unit, max(b_shares)), 1)  # copies whose outputs are held at a time
    passes = ceil_div(max(b_shares), held)
    x_tiles, y_tiles = a_share * unit, passes * held * unit
    starts = [sum(modules.outputs[:m]) // TILE for m in range(modules.count)]
    sizes = [*sorted({n // TILE % GROUPS for n in modules.outputs} - {0}), GROUPS]
    most_rounds = ceil_div(most_slabs, ROUND)

    def body(given_gmem, pool_gmem, line_gmem, lines, scales, page_list, result_gmem) -> None:
        block, module, part = (lax.axis_index(name) for name in ("block", "module", "part"))
        where = line_gmem[0], modules.first + module, block
        token, count, slabs, a_tile, segment = (lines[(*where, f)] for f in range(5))
        at_hand = [lines[(*where, 5 + n)] for n in range(PAGES_AT_HAND)]
        scale = scales[where]
        first_page = lax.div(a_tile, jnp.int32(layout.tiles_per_page))
        if layer is None:
            first_page = lax.div(first_page, jnp.int32(layers))

        def page_of(number: Any) -> Any:
            """The adapter's page; the first ones of a module wait for no other read than that."""
            n = number - first_page
            return lax.cond(
                n < PAGES_AT_HAND, lambda: choose(n, at_hand), lambda: page_list[segment, number]
            )

        def of_module(values: Sequence[int]) -> Any:
            return choose(module, values)

        def run(smem, x_ready, y_ready, ready, free, shared) -> None:
            x_smem, y_smem, tiles, sums_smem, twice, spread = smem
            a_first = part * a_share if divided else 0 * part
            a_mine = jnp.clip(a_copies - a_first, 0, a_share)
            b_first = part * of_module(b_shares)
            b_mine = jnp.clip(of_module(b_copies) - b_first, 0, of_module(b_shares))
            a_steps = slabs * a_mine
            steps = a_steps + slabs * b_mine
            rounds = lax.div(slabs + (ROUND - 1), jnp.int32(ROUND))

            def for_tiles(do: Callable[..., None], otherwise: Callable[[], None]) -> None:
                """The CTA's outputs, tile by tile, no more than the module has left."""
                group = of_module(starts) + b_first * (unit * GROUPS)
                left = of_module([n // TILE for n in modules.outputs]) - b_first * (unit * GROUPS)

                @pl.loop(0, y_tiles)
                def _(t):
                    here = left - t * GROUPS
                    mine = (t < b_mine * unit) & (here > 0)
                    for size in sizes:

                        @pl.when(mine & (here >= size if size == GROUPS else here == size))
                        def _(size=size):
                            do(
                                result_gmem.at[token, pl.ds(group + t * GROUPS, size)],
                                y_smem.at[pl.ds(pl.multiple_of(t * GROUPS, GROUPS), size)],
                            )

                    pl.when(~mine)(otherwise)

            def load() -> None:
                """Runs ahead: all of A, slab by slab, then of each pass B, slab by slab."""
                a_stride = layout.slab_tiles(modules.inputs)
                b_stride = of_module([layout.slab_tiles(n) for n in modules.outputs])
                aligned = jnp.int32(layout.copy_tiles)
                b_tile = a_tile + lax.div(slabs * a_stride + (aligned - 1), aligned) * aligned

                def fetch(step: Any, tile: Any) -> None:
                    stage = lax.rem(step, jnp.int32(stages))
                    # Found before the wait, which hides the time that looking up a page takes.
                    source = tile_rows(
                        pool_gmem,
                        page_of,
                        line_gmem[0],
                        tile,
                        0,
                        unit * TILE,
                        spread=layer is None,
                        layout=layout,
                    )
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
                    plgpu.copy_gmem_to_smem(source, tiles.at[stage], ready.at[stage])

                def fetch_slabs(step: Any, tile: Any, stride: Any, copies: Any) -> None:
                    @pl.loop(0, slabs)
                    def _(slab):
                        @pl.loop(0, copies)
                        def _(u):
                            fetch(step + slab * copies + u, tile + slab * stride + u * unit)

                for t in range(x_tiles):
                    groups_of = pl.ds((a_first * unit + t) * GROUPS, GROUPS)

                    @pl.when(t < a_mine * unit)
                    def _(t=t, groups_of=groups_of):
                        there = given_gmem.at[token, groups_of]
                        plgpu.copy_gmem_to_smem(there, x_smem.at[t], x_ready)

                    pl.when(t >= a_mine * unit)(lambda: plgpu.barrier_arrive(x_ready))
                if shrinks:
                    fetch_slabs(0, a_tile + a_first * unit, a_stride, a_mine)
                if not expands:
                    return
                for_tiles(
                    lambda row, smem: plgpu.copy_gmem_to_smem(row, smem, y_ready),
                    lambda: plgpu.barrier_arrive(y_ready),
                )

                @pl.loop(0, passes)
                def _(number):
                    done = number * held
                    here = jnp.clip(b_mine - done, 0, held)
                    fetch_slabs(
                        a_steps + jnp.minimum(done, b_mine) * slabs,
                        b_tile + (b_first + done) * unit,
                        b_stride,
                        here,
                    )

            def multiply_all(first: Any, count: Any, multiply: Callable[[Any, Any], None]) -> None:
                """Multiplies the tiles of `count` steps, and lets their places be filled again."""

                @pl.loop(0, count)
                def _(u):
                    step = first + u
                    stage = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(ready.at[stage])
                    multiply(u, tiles.at[stage])
                    plgpu.wgmma_wait(0)  # a step in flight would be a place less to load into
                    # Nobody waits for the last places.
                    pl.when(step + stages < steps)(lambda: plgpu.barrier_arrive(free.at[stage]))

            def compute() -> None:
                row, column = (iota(TILE, GROUPS, d) for d in (0, 1))
                own = lax.shift_right_logical(row, 3) == column

                def of_slab(slab: Any) -> jax.Array:
                    """Sums of the CTA's columns, `[(j, i)]`: rank i over column groups j."""

                    def products(acc):
                        def multiply(u, stage_tiles):
                            for t in range(unit):
                                xs = x_smem.at[u * unit + t].transpose((1, 0))
                                plgpu.wgmma(acc, stage_tiles.at[pl.ds(t * TILE, TILE)], xs)

                        multiply_all(slab * a_mine, a_mine, multiply)
                        return acc[...]

                    acc = pl.run_scoped(products, accumulator(TILE, GROUPS))
                    return jnp.where(own, acc, 0.0).sum(axis=1)

                def shrink(round_: Any) -> None:
                    """The sums of 8 slabs, `[(j, i), slab]`, to all CTAs of the cluster."""

                    def one(s, sums):
                        of_one = lax.broadcast_in_dim(of_slab(round_ * ROUND + s), sums.shape, [0])
                        return jnp.where(column == s, of_one, sums)

                    zeros = plgpu.layout_cast(jnp.zeros((TILE, ROUND), jnp.float32), WGMMA)
                    sums = lax.fori_loop(0, jnp.minimum(slabs - round_ * ROUND, ROUND), one, zeros)
                    if not expands:
                        result_gmem[token, module, part, round_] = sums
                        return
                    sums_smem[round_, part if exchange else 0] = sums
                    for p in range(parts if exchange else 0):

                        @pl.when(part != p)
                        def _(p=p):
                            to = {"cluster_idx": jnp.int32(p), "cluster_dim": "part"}
                            there = sums_smem.at[round_, part]
                            plgpu.async_store_smem(sums, there, shared.at[round_], **to)

                def total_of(round_: Any) -> jax.Array:
                    """h of 8 slabs, `[(j, i), slab]`: for every j rank i, summed over all j."""
                    if not shrinks:
                        h = given_gmem.at[token, module, round_]
                        return plgpu.load(h, layout=WGMMA, optimized=False)
                    if exchange:
                        plgpu.barrier_wait(shared.at[round_])
                    sums = [
                        plgpu.load(sums_smem.at[round_, p], layout=WGMMA, optimized=False)
                        for p in range(parts if exchange else 1)
                    ]
                    total = sum(sums[1:], sums[0])
                    # Twice below each other: the sum over j, for all j, by 8 moved loads.
                    for first in (0, TILE):
                        store(twice.at[pl.ds(first, TILE)], total)
                    plgpu.commit_smem()
                    h = moved(twice, 0)
                    for j in range(1, GROUPS):
                        h += moved(twice, SLAB_RANKS * j)
                    return h

                def prepare(round_: Any) -> None:
                    """h of 8 slabs, as `spread` has it."""
                    h = total_of(round_)

                    @pl.loop(0, jnp.minimum(slabs - round_ * ROUND, ROUND))
                    def _(s):
                        values = jnp.where(column == s, h, 0.0).sum(axis=1) * scale
                        values = lax.broadcast_in_dim(values, (TILE, GROUPS), [0])
                        values = jnp.where(own, values, 0.0)
                        high = values.astype(dtype)
                        low = (values - high.astype(jnp.float32)).astype(dtype)
                        for half, first in ((high, 0), (low, GROUPS)):
                            at = spread.at[round_ * ROUND + s, pl.ds(first, GROUPS)]
                            at.transpose((1, 0))[...] = half

                    plgpu.commit_smem()

                if shrinks:
                    plgpu.barrier_wait(x_ready)
                    pl.loop(0, rounds)(shrink)
                if not expands:
                    return
                if shrinks:
                    plgpu.commit_smem()
                pl.loop(0, rounds)(prepare)
                plgpu.barrier_wait(y_ready)

                @pl.loop(0, passes)
                def _(number):
                    done = number * held
                    here = jnp.clip(b_mine - done, 0, held)
                    first = a_steps + jnp.minimum(done, b_mine) * slabs

                    def products(*accs):
                        @pl.loop(0, slabs)
                        def _(slab):
                            h = spread.at[slab].transpose((1, 0))  # [(j', i), high and low of j]

                            def multiply(u, stage_tiles):
                                for t in range(unit):
                                    tile = stage_tiles.at[pl.ds(t * TILE, TILE)]
                                    for at in range(held):

                                        @pl.when(u == at)
                                        def _(tile=tile, acc=accs[at * unit + t]):
                                            plgpu.wgmma(acc, tile.transpose((1, 0)), h)

                            multiply_all(first + slab * here, here, multiply)

                        return [acc[...] for acc in accs]

                    accumulators = [accumulator(TILE, 2 * GROUPS)] * (held * unit)
                    for t, sums in enumerate(pl.run_scoped(products, *accumulators)):
                        delta = sums[:, :GROUPS] + sums[:, GROUPS:]
                        at = pl.multiple_of((done * unit + t) * GROUPS, GROUPS)
                        ys = y_smem.at[pl.ds(at, GROUPS)].transpose((1, 0))
                        old = plgpu.load(ys, layout=WGMMA, optimized=False)
                        store(ys, (old.astype(jnp.float32) + delta).astype(dtype))

                plgpu.commit_smem()
                for_tiles(lambda row, smem: plgpu.copy_smem_to_gmem(smem, row), lambda: None)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == 0)(compute)
            pl.when(warpgroup == 1)(load)

        @pl.when((count > 0) & (slabs > 0))
        def _():
            # What a half does not use is None, and takes no room in shared memory.
            x_smem = y_smem = sums_smem = twice = spread = x_ready = y_ready = shared = None
            if shrinks:
                x_smem = plgpu.SMEM((x_tiles, GROUPS, TILE), dtype, transforms=swizzled())
                x_ready = plgpu.Barrier(num_arrivals=x_tiles)
            if expands:
                y_smem = plgpu.SMEM((y_tiles * GROUPS, TILE), dtype)
                y_ready = plgpu.Barrier(num_arrivals=y_tiles)
                spread = plgpu.SMEM((most_slabs, 2 * GROUPS, TILE), dtype, transforms=swizzled())
            if whole:
                senders = parts if exchange else 1
                sums_smem = plgpu.SMEM(
                    (most_rounds, senders, TILE, ROUND),
                    jnp.float32,
                    transforms=swizzled(plgpu.find_swizzle(ROUND * 32) // 4, itemsize=4),
                )
                twice = plgpu.SMEM((2 * TILE, ROUND), jnp.float32)
                shared = plgpu.Barrier(num_arrivals=max(senders - 1, 1), num_barriers=most_rounds)
            tiles = plgpu.SMEM((stages, unit * TILE, TILE), dtype, transforms=swizzled())
            pl.run_scoped(
                run,
                (x_smem, y_smem, tiles, sums_smem, twice, spread),
                x_ready,
                y_ready,
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                shared,
                collective_axes="warpgroup",
            )

    given: Any = h
    if x is not None:
        missing = -x.shape[1] % (unit * TILE_COLUMNS)
        if missing:  # whole copies only: no TMA box ends within a tile
            x = jnp.pad(x, ((0, 0), (0, missing)))
        given = x.reshape(x.shape[0], -1, TILE)
    operands: list[Any] = [
        given,
        tiled_pool(pool, layout),
        line.reshape(1).astype(jnp.int32),
        work.lines,
        work.scale,
        pages,
    ]
    out_type: Any = ()
    if y is None:
        shape = given.shape[0], modules.count, parts, most_rounds, TILE, ROUND
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
    else:
        operands.append(jax.new_ref(y.reshape(y.shape[0], -1, TILE)))
    if whole:
        name, clusters = "lora_gather", {"cluster": (parts,), "cluster_names": ("part",)}
        grid = {"block": blocks, "module": modules.count}
    else:
        name, clusters = f"lora_gather_{'shrink' if shrinks else 'expand'}", {}
        grid = {"block": blocks, "module": modules.count, "part": parts}
    sums: Any = pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=2,
            thread_name="warpgroup",
            **clusters,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name=name,
    )(*operands)
    return sums if y is None else operands[-1][...].reshape(y.shape)


def moved(ref: Any, first: int) -> jax.Array:
    """64 rows of a buffer, the first one's number given."""
    return plgpu.load(ref.at[pl.ds(first, TILE)], layout=WGMMA, optimized=False)
