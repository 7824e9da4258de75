# SPDX-License-Identifier: Apache-2.0
"""LoRA of single tokens over paged adapters: shrink, expand and add in one Mosaic GPU kernel.

The gather form, for decode: every token reads its own adapter's A and B once, which is all the time
there is. A CTA does one module of one token; its loader runs ahead, through A and on into B. Where
tokens are few, `parts` CTAs share a module's outputs: all of them multiply the whole of A, which
the others then find in the L2 cache, so that none waits for another.

The tensor cores work on tiles as they lie in the pool (`layout.py`), by leaving most of each
product unused.
    Shrink: a tile `[(j, i), 64]` times x `[j', 64]`ᵀ holds rank i's partial sum of column group j
    where j = j'. The rest is masked and the sum over j taken at the end.
    Expand: h spread out as `[j, (j', i)]`, zero where j ≠ j', times a tile `[(j', i), 64]` gives 8
    groups of 64 outputs.
h stays float32: as a tensor-core operand it is two numbers of the model's dtype, high and low.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import SLAB_RANKS, TILE, TILE_COLUMNS, PageLayout, ceil_div
from pallas_kernels.lora_tiles import GROUPS, choose, tile_rows, tiled_pool
from pallas_kernels.mosaic import COLUMNS, accumulator, iota, swizzled
from pallas_kernels.segments import Adapters, Modules

MOST_TILES = 32  # of outputs in a CTA's shared memory, 1 KiB each
HELD_TILES = 2  # of outputs that a CTA sums in registers at a time: 32 registers a tile


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the kernel.

    Attributes:
        ctas: CTAs that the GPU should be given, if outputs can be shared among so many.
        most_parts: most CTAs that share a token's module.
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
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: Tuning,
) -> jax.Array:
    """`y + s · (x Aᵀ) Bᵀ`; the lines of `adapters.work` are single tokens."""
    dtype, layers = pool.dtype, pool.shape[0]
    tokens = x.shape[0]
    most_slabs = ceil_div(max_rank, SLAB_RANKS)
    line = jnp.int32(layers) if layer is None else layer
    stages, blocks = tuning.stages, adapters.work.shape[2]
    widths = (modules.inputs, *modules.outputs)
    unit = min(tuning.copy_tiles, layout.copy_tiles, *map(layout.slab_tiles, widths))

    def copies_of(columns: int) -> int:  # of a slab
        return ceil_div(ceil_div(columns, TILE_COLUMNS), unit)

    a_copies, b_copies = copies_of(modules.inputs), [copies_of(n) for n in modules.outputs]
    parts = ceil_div(tuning.ctas, blocks * modules.count)
    parts = max(1, min(parts, tuning.most_parts, max(b_copies)))
    parts = max(parts, ceil_div(max(b_copies) * unit, MOST_TILES))
    b_shares = [ceil_div(n, parts) for n in b_copies]
    held = max(min(HELD_TILES // unit, max(b_shares)), 1)  # copies whose outputs are held at a time
    passes = ceil_div(max(b_shares), held)
    x_tiles, y_tiles = a_copies * unit, passes * held * unit
    starts = [sum(modules.outputs[:m]) // TILE for m in range(modules.count)]
    sizes = [*sorted({n // TILE % GROUPS for n in modules.outputs} - {0}), GROUPS]

    def body(y_gmem, x_gmem, pool_gmem, line_gmem, work, scales, page_list) -> None:
        block, module, part = (lax.axis_index(name) for name in ("block", "module", "part"))
        where = line_gmem[0], modules.first + module, block
        token, count, slabs, a_tile, segment = (work[(*where, f)] for f in range(5))
        scale = scales[where]

        def of_module(values: Sequence[int]) -> Any:
            return choose(module, values)

        def run(smem, x_ready, y_ready, ready, free) -> None:
            x_smem, y_smem, tiles, sums_smem, spread = smem
            b_first = part * of_module(b_shares)
            b_mine = jnp.clip(of_module(b_copies) - b_first, 0, of_module(b_shares))
            a_steps = slabs * a_copies
            steps = a_steps + slabs * b_mine

            def for_tiles(do: Callable[..., None], otherwise: Callable[[], None]) -> None:
                """The CTA's outputs, tile by tile, no more than the module has left."""
                group = of_module(starts) + b_first * (unit * GROUPS)
                left = of_module([n // TILE for n in modules.outputs]) - b_first * (unit * GROUPS)
                for t in range(y_tiles):
                    here = left - t * GROUPS
                    mine = (t < b_mine * unit) & (here > 0)
                    for size in sizes:

                        @pl.when(mine & (here >= size if size == GROUPS else here == size))
                        def _(t=t, size=size):
                            do(
                                y_gmem.at[token, pl.ds(group + t * GROUPS, size)],
                                y_smem.at[pl.ds(t * GROUPS, size)],
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
                        page_list,
                        line_gmem[0],
                        segment,
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
                    groups_of = pl.ds(t * GROUPS, GROUPS)
                    plgpu.copy_gmem_to_smem(x_gmem.at[token, groups_of], x_smem.at[t], x_ready)
                fetch_slabs(0, a_tile, a_stride, a_copies)
                for_tiles(
                    lambda row, smem: plgpu.copy_gmem_to_smem(row, smem, y_ready),
                    lambda: plgpu.barrier_arrive(y_ready),
                )
                for done in range(0, passes * held, held):
                    here = jnp.clip(b_mine - done, 0, held)
                    first = b_tile + (b_first + done) * unit
                    fetch_slabs(a_steps + done * slabs, first, b_stride, here)

            def consume(step: Any, multiply: Callable[[Any], None]) -> None:
                """Waits for a step's tiles, uses them, and lets their place be filled again."""
                stage = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                multiply(tiles.at[stage])
                plgpu.wgmma_wait(0)
                # Nobody waits for the last places.
                pl.when(step + stages < steps)(lambda: plgpu.barrier_arrive(free.at[stage]))

            def compute() -> None:
                row, column = (iota(TILE, TILE, d) for d in (0, 1))
                diagonal = lax.bitwise_and(row, 7) == lax.shift_right_logical(column, 3)
                narrow_row, narrow_column = (iota(TILE, 8, d) for d in (0, 1))
                own = lax.shift_right_logical(narrow_row, 3) == narrow_column

                def spread_out(h: jax.Array, slab: Any) -> None:
                    """h of a slab, as 8 rows of high and 8 of low; then 48 rows of nothing."""
                    values = lax.broadcast_in_dim(h * scale, (TILE, TILE), [1])
                    values = jnp.where(diagonal, values, 0.0)
                    high = values.astype(dtype)
                    low = (values - high.astype(jnp.float32)).astype(dtype)
                    rows = pl.ds(pl.multiple_of(slab * 16, 8), TILE)
                    spread[rows] = jnp.where(row < 8, high, low)

                plgpu.barrier_wait(x_ready)

                @pl.loop(0, slabs)
                def _(slab):
                    def products(acc):
                        @pl.loop(0, a_copies)
                        def _(u):
                            def multiply(stage_tiles):
                                for t in range(unit):
                                    xs = x_smem.at[u * unit + t].transpose((1, 0))
                                    plgpu.wgmma(acc, stage_tiles.at[pl.ds(t * TILE, TILE)], xs)

                            consume(slab * a_copies + u, multiply)

                        return acc[...]

                    acc = pl.run_scoped(products, accumulator(TILE, 8))
                    sums = jnp.where(own, acc, 0.0).sum(axis=1)
                    # Twice in a row: the sum over j comes out 8 times over, by 8 moved loads.
                    sums_smem[pl.ds(0, TILE)] = sums
                    sums_smem[pl.ds(TILE, TILE)] = sums
                    h = vector(sums_smem.at[pl.ds(0, TILE)])
                    for j in range(1, GROUPS):
                        h += vector(sums_smem.at[pl.ds(SLAB_RANKS * j, TILE)])
                    spread_out(h, slab)

                plgpu.commit_smem()
                plgpu.barrier_wait(y_ready)
                for done in range(0, passes * held, held):

                    def products(*accs, done=done):
                        here = jnp.clip(b_mine - done, 0, held)

                        @pl.loop(0, slabs)
                        def _(slab):
                            rows = pl.multiple_of(slab * 16, 8)
                            for u in range(held):

                                @pl.when(u < here)
                                def _(u=u):
                                    def multiply(stage_tiles):
                                        for t in range(unit):
                                            tile = stage_tiles.at[pl.ds(t * TILE, TILE)]
                                            acc = accs[u * unit + t]
                                            for low in (0, 8):
                                                h = spread.at[pl.ds(rows + low, TILE)]
                                                plgpu.wgmma(acc, h, tile)

                                    consume(a_steps + done * slabs + slab * here + u, multiply)

                        return [acc[...] for acc in accs]

                    accumulators = [accumulator(TILE, TILE)] * (held * unit)
                    for t, delta in enumerate(pl.run_scoped(products, *accumulators)):
                        ys = y_smem.at[pl.ds((done * unit + t) * GROUPS, TILE)]
                        old = ys[...]
                        new = (old.astype(jnp.float32) + delta).astype(dtype)
                        ys[...] = jnp.where(row < GROUPS, new, old)
                plgpu.commit_smem()
                for_tiles(lambda row, smem: plgpu.copy_smem_to_gmem(smem, row), lambda: None)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == 0)(compute)
            pl.when(warpgroup == 1)(load)

        @pl.when((count > 0) & (slabs > 0))
        def _():
            pl.run_scoped(
                run,
                (
                    plgpu.SMEM((x_tiles, 8, TILE), dtype, transforms=swizzled()),
                    plgpu.SMEM((y_tiles * GROUPS + TILE - GROUPS, TILE), dtype),
                    plgpu.SMEM((stages, unit * TILE, TILE), dtype, transforms=swizzled()),
                    plgpu.SMEM((2 * TILE,), jnp.float32),
                    plgpu.SMEM((16 * most_slabs + TILE, TILE), dtype, transforms=swizzled()),
                ),
                plgpu.Barrier(num_arrivals=x_tiles),
                plgpu.Barrier(num_arrivals=y_tiles),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                collective_axes="warpgroup",
            )

    missing = -x.shape[1] % (unit * TILE_COLUMNS)
    if missing:  # whole copies only: no TMA box ends within a tile
        x = jnp.pad(x, ((0, 0), (0, missing)))
    result = jax.new_ref(y.reshape(tokens, -1, TILE))
    pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(blocks, modules.count, parts),
            grid_names=("block", "module", "part"),
            num_threads=2,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name="lora_gather",
    )(
        result,
        x.reshape(tokens, -1, TILE),  # pyright: ignore[reportCallIssue]
        tiled_pool(pool, layout),
        line.reshape(1).astype(jnp.int32),
        adapters.work,
        adapters.work_scale,
        adapters.pages,
    )
    return result[...].reshape(y.shape)


def vector(ref: Any) -> jax.Array:
    """64 numbers, one a column of a WGMMA tile."""
    return plgpu.load(ref, layout=COLUMNS, optimized=False)
