# SPDX-License-Identifier: Apache-2.0
"""LoRA over paged adapters as one Mosaic GPU kernel: shrink, expand, or both in a single launch.

A cluster of `parts` CTAs does one module of one block of tokens that share an adapter. A is split
over the CTAs by columns and B by outputs, so both are read once, at full width, and B is on its way
while A is still being multiplied. In between the CTAs exchange their parts of h, a few hundred
bytes, through global memory and a cluster barrier.

The tensor cores work on tiles as they lie in the pool (`layout.py`), by leaving most of each
product unused; reading the tiles is what takes the time.
    Shrink: a tile `[(j, i), 64]` times x `[(token, j'), 64]`ᵀ holds rank i's partial sum of column
    group j where j = j'. The rest is masked and the sum over j taken at the end.
    Expand: h spread out as `[(token, j), (j', i)]`, zero where j ≠ j', times a tile `[(j', i), 64]`
    gives 8 groups of 64 outputs of each token.
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
from pallas_kernels.segments import Adapters, Modules

GROUPS = TILE_COLUMNS // TILE  # runs of 64 columns in a tile
MOST_TILES = 4  # of outputs that a CTA holds in registers: 32 of them a tile
SWIZZLED = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
WGMMA = plgpu.Layout.WGMMA
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the kernel.

    Attributes:
        parts: CTAs that share a block's module, up to 8.
        stages: copies of adapter tiles that a CTA has in flight.
        copy_tiles: tiles of a copy, where the layout allows.
    """

    parts: int
    stages: int
    copy_tiles: int = 2


def slabs_of(max_rank: int) -> int:
    return ceil_div(max_rank, SLAB_RANKS)


def lora_kernel(
    x: jax.Array | None,
    y: jax.Array | None,
    h: jax.Array | None,
    pool: jax.Array,
    layer: jax.Array | None,
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: Tuning,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Shrink without y, expand without x, both with x and y.

    Args:
        x: `[T, I]`.
        y: `[T, O]`.
        h: for expand, `[T, M, slabs, 1, 64]`: the ranks of a slab, 8 times over.

    Returns:
        y with the deltas added, and h: for shrink as it was exchanged, `[T, M, slabs, parts, 64]`,
        where only what belongs to a token, a module and a slab in use was written.
    """
    shrinks, expands = x is not None, y is not None
    dtype, layers, pages = pool.dtype, pool.shape[0], pool.shape[1]
    tokens_of_step = (x if shrinks else h).shape[0]
    most = adapters.block
    line = jnp.int32(layers) if layer is None else layer

    widths = ([modules.inputs] if shrinks else []) + (list(modules.outputs) if expands else [])
    unit = min(tuning.copy_tiles, layout.copy_tiles, *map(layout.slab_tiles, widths))

    def copies_of(columns: int) -> int:
        return ceil_div(ceil_div(columns, TILE_COLUMNS), unit)

    parts, stages = tuning.parts, tuning.stages
    b_copies = [copies_of(n) if expands else 0 for n in modules.outputs]
    chunks = max(ceil_div(n, parts * (MOST_TILES // unit)) for n in b_copies) if expands else 1
    b_shares = [ceil_div(n, parts * chunks) for n in b_copies]  # copies of a slab, each CTA's
    a_copies = copies_of(modules.inputs) if shrinks else 0
    a_share = ceil_div(a_copies, parts)
    x_tiles, y_tiles = a_share * unit, max(b_shares) * unit
    starts = [sum(modules.outputs[:m]) // TILE for m in range(modules.count)]
    sizes = sorted({n // TILE % GROUPS for n in modules.outputs} - {0}) + [GROUPS]

    def body(*refs: Any) -> None:
        names = ["y"] * expands + ["x"] * shrinks
        names += ["pool", "line", "work", "scales", "pages", "h"]
        gmem = dict(zip(names, refs, strict=True))
        block, module, chunk = (lax.axis_index(name) for name in ("block", "module", "chunk"))
        part = lax.axis_index("part")
        where = gmem["line"][0], modules.first + module, block
        first_token, tokens, slabs, a_tile, segment = (gmem["work"][(*where, f)] for f in range(5))

        def of_module(values: Sequence[int]) -> Any:
            chosen = jnp.int32(values[0])
            for m, value in enumerate(values[1:], 1):
                chosen = jnp.where(module == m, jnp.int32(value), chosen)
            return chosen

        def token_at(place: int) -> Any:  # past the block's tokens the last one again: never used
            return first_token + jnp.minimum(place, tokens - 1)

        def run(x_smem, y_smem, tiles, sums_smem, spread, x_ready, y_ready, ready, together):
            a_mine = jnp.clip(a_copies - part * a_share, 0, a_share)
            b_share, b_part = of_module(b_shares), chunk * parts + part
            b_mine = jnp.clip(of_module(b_copies) - b_part * b_share, 0, b_share)
            a_steps = slabs * a_mine
            steps = a_steps + slabs * b_mine
            a_stride = layout.slab_tiles(modules.inputs)
            b_stride = of_module([layout.slab_tiles(n) for n in modules.outputs])
            aligned = jnp.int32(layout.copy_tiles)
            b_tile = a_tile + lax.div(slabs * a_stride + (aligned - 1), aligned) * aligned
            group = of_module(starts) + b_part * b_share * (unit * GROUPS)
            left = of_module([n // TILE for n in modules.outputs]) - b_part * b_share * (
                unit * GROUPS
            )

            def fetch(step: Any) -> None:
                """Starts the copy of a step's tiles: all of A, then B, slab by slab."""
                of_a = step < a_steps
                place = jnp.where(of_a, step, step - a_steps)
                each = jnp.maximum(jnp.where(of_a, a_mine, b_mine), 1)
                slab = lax.div(place, each)
                first = jnp.where(of_a, a_tile + slab * a_stride, b_tile + slab * b_stride)
                ahead = jnp.where(of_a, part * a_share, b_part * b_share) + place - slab * each
                tile = first + ahead * unit
                slot = lax.div(tile, jnp.int32(layout.tiles_per_page))
                row = (tile - slot * layout.tiles_per_page) * TILE
                page_of, slot_layer = slot, gmem["line"][0]
                if layer is None:  # the slots of all layers, page after page
                    page_of = lax.div(slot, jnp.int32(layers))
                    slot_layer = slot - page_of * layers
                stage = lax.rem(step, jnp.int32(stages))
                plgpu.copy_gmem_to_smem(
                    gmem["pool"].at[
                        slot_layer,
                        gmem["pages"][segment, page_of],
                        pl.ds(pl.multiple_of(row, TILE), unit * TILE),
                    ],
                    tiles.at[stage],
                    ready.at[stage],
                )

            def arrived(step: Any) -> Any:
                stage = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                return stage

            def refill(step: Any) -> None:
                pl.when(step + stages < steps)(lambda: fetch(step + stages))

            for step in range(stages):
                pl.when(step < steps)(lambda step=step: fetch(jnp.int32(step)))

            def iota(columns: int, dimension: int) -> Any:
                return plgpu.broadcasted_iota(jnp.int32, (TILE, columns), dimension, layout=WGMMA)

            def load_x(count: int) -> None:
                for t in range(x_tiles):
                    for place in range(count):
                        plgpu.copy_gmem_to_smem(
                            gmem["x"].at[
                                token_at(place), pl.ds((part * x_tiles + t) * GROUPS, GROUPS)
                            ],
                            x_smem.at[t, pl.ds(place * GROUPS, GROUPS)],
                            x_ready[count > 1],
                        )

            def shrink(count: int) -> None:
                """The CTA's columns' part of h."""
                mine = lax.shift_right_logical(iota(count * 8, 0), 3)
                column = iota(count * 8, 1)

                @pl.loop(0, slabs)
                def _(slab):
                    def products(acc):
                        @pl.loop(0, a_mine)
                        def _(u):
                            step = slab * a_mine + u
                            stage = arrived(step)
                            for t in range(unit):
                                xs = x_smem.at[u * unit + t, pl.ds(0, count * GROUPS)]
                                tile = tiles.at[stage, pl.ds(t * TILE, TILE)]
                                plgpu.wgmma(acc, tile, xs.transpose((1, 0)))
                            plgpu.wgmma_wait(0)
                            refill(step)

                        return acc[...]

                    acc = pl.run_scoped(products, plgpu.ACC((TILE, count * 8), jnp.float32))
                    for place in range(count):
                        sums = jnp.where(column == place * 8 + mine, acc, 0.0).sum(axis=1)
                        # Twice in a row: the sum over j then comes 8 times over, by 8 moved loads.
                        sums_smem[place, pl.ds(0, TILE)] = sums
                        sums_smem[place, pl.ds(TILE, TILE)] = sums
                    for place in range(count):
                        total = vector(sums_smem.at[place, pl.ds(0, TILE)])
                        for j in range(1, GROUPS):
                            total += vector(sums_smem.at[place, pl.ds(SLAB_RANKS * j, TILE)])

                        @pl.when(place < tokens)
                        def _(place=place, total=total):
                            gmem["h"][first_token + place, module, slab, b_part] = total

            def spread_h(slab: Any, count: int) -> None:
                """h of one slab as operands: `8 * count` rows of high, then as many of low."""
                row, column = iota(TILE, 0), lax.shift_right_logical(iota(TILE, 1), 3)
                diagonal = lax.bitwise_and(row, 7) == column
                token = lax.shift_right_logical(row, 3)
                if count < 8:
                    token = lax.rem(token, jnp.int32(count))
                values = None
                for place in range(count):
                    of_slab = gmem["h"].at[token_at(place), module, slab]
                    total = vector(of_slab.at[chunk * parts if shrinks else 0])
                    for p in range(1, parts if shrinks else 1):
                        total += vector(of_slab.at[chunk * parts + p])
                    wide = lax.broadcast_in_dim(total * gmem["scales"][where], (TILE, TILE), [1])
                    values = wide if values is None else jnp.where(token == place, wide, values)
                values = jnp.where(diagonal, values, 0.0)
                high = values.astype(dtype)
                low = (values - high.astype(jnp.float32)).astype(dtype)
                if count < 8:
                    spread[pl.ds(0, TILE)] = jnp.where(row < 8 * count, high, low)
                else:
                    spread[pl.ds(0, TILE)] = high
                    spread[pl.ds(TILE, TILE)] = low
                plgpu.commit_smem()

            def for_rows(
                count: int, do: Callable[..., None], otherwise: Callable[[], None]
            ) -> None:
                """Every token's groups of every tile, no more than the module has left."""
                for t in range(y_tiles):
                    here = left - t * GROUPS
                    inside = (of_module(b_shares) * unit > t) & (here > 0)
                    for place in range(count):
                        rows = (t * count + place) * GROUPS
                        for size in sizes:
                            fits = here >= size if size == GROUPS else here == size

                            @pl.when((place < tokens) & inside & fits)
                            def _(t=t, place=place, rows=rows, size=size):
                                do(
                                    gmem["y"].at[
                                        first_token + place, pl.ds(group + t * GROUPS, size)
                                    ],
                                    y_smem.at[pl.ds(rows, size)],
                                )

                        pl.when((place >= tokens) | ~inside)(otherwise)

            def load_y(count: int) -> None:
                arrive = y_ready[count > 1]
                for_rows(
                    count,
                    lambda row, smem: plgpu.copy_gmem_to_smem(row, smem, arrive),
                    lambda: plgpu.barrier_arrive(arrive),
                )

            def expand(count: int) -> None:
                def products(*accs):
                    @pl.loop(0, slabs)
                    def _(slab):
                        spread_h(slab, count)
                        for u in range(y_tiles // unit):

                            @pl.when(u < b_mine)
                            def _(u=u):
                                step = a_steps + slab * b_mine + u
                                stage = arrived(step)
                                for t in range(unit):
                                    tile = tiles.at[stage, pl.ds(t * TILE, TILE)]
                                    acc = accs[u * unit + t]
                                    plgpu.wgmma(acc, spread.at[pl.ds(0, TILE)], tile)
                                    plgpu.wgmma(acc, spread.at[pl.ds(8 * count, TILE)], tile)
                                plgpu.wgmma_wait(0)
                                refill(step)

                    return [acc[...] for acc in accs]

                accumulators = [plgpu.ACC((TILE, TILE), jnp.float32) for _ in range(y_tiles)]
                deltas = pl.run_scoped(products, *accumulators)
                plgpu.barrier_wait(y_ready[count > 1])
                mine = iota(TILE, 0) < 8 * count
                for t, delta in enumerate(deltas):
                    ys = y_smem.at[pl.ds(t * 8 * count, TILE)]
                    old = ys[...]
                    new = (old.astype(jnp.float32) + delta).astype(dtype)
                    ys[...] = new if count == 8 else jnp.where(mine, new, old)
                plgpu.commit_smem()
                for_rows(count, lambda row, smem: plgpu.copy_smem_to_gmem(smem, row), lambda: None)
                plgpu.wait_smem_to_gmem(0)

            for count, chosen in ((1, tokens == 1), (most, tokens > 1))[: 2 if most > 1 else 1]:

                @pl.when(chosen)
                def _(count=count):
                    if shrinks:
                        load_x(count)
                    if expands:
                        load_y(count)
                    if shrinks:
                        plgpu.barrier_wait(x_ready[count > 1])
                        shrink(count)
                        plgpu.commit_smem()  # all warps have written their part of h
                        if parts > 1 and expands:
                            plgpu.barrier_arrive(together)
                            plgpu.barrier_wait(together)
                    if expands:
                        expand(count)

        def barriers(copies: int) -> tuple[Any, Any]:
            copies = max(copies, 1)
            return plgpu.Barrier(num_arrivals=copies), plgpu.Barrier(num_arrivals=copies * most)

        @pl.when((tokens > 0) & (slabs > 0))
        def _():
            y_rows = y_tiles * 8 * most + (TILE - 8 * most)
            pl.run_scoped(
                run,
                plgpu.SMEM((max(x_tiles, 1), 8 * most, TILE), dtype, transforms=SWIZZLED),
                plgpu.SMEM((max(y_rows, TILE), TILE), dtype),
                plgpu.SMEM((stages, unit * TILE, TILE), dtype, transforms=SWIZZLED),
                plgpu.SMEM((most, 2 * TILE), jnp.float32),
                plgpu.SMEM((8 * most + TILE, TILE), dtype, transforms=SWIZZLED),
                barriers(x_tiles),
                barriers(y_tiles),
                plgpu.Barrier(num_barriers=stages),
                plgpu.ClusterBarrier(collective_axes=("part",)),
            )

    def groups(array: jax.Array) -> jax.Array:
        return array.reshape(tokens_of_step, -1, TILE)

    operands: list[Any] = []
    if y is not None:
        operands.append(jax.new_ref(groups(y)))
    if x is not None:
        missing = -x.shape[1] % TILE_COLUMNS  # whole tiles only: half of one has no TMA box
        operands.append(groups(jnp.pad(x, ((0, 0), (0, missing))) if missing else x))
    operands += [
        pool.reshape(layers, pages, layout.tiles_per_page * TILE, TILE),
        line.reshape(1).astype(jnp.int32),
        adapters.work,
        adapters.work_scale,
        adapters.pages,
    ]
    h_shape = (tokens_of_step, modules.count, slabs_of(max_rank), chunks * parts, TILE)
    exchanged = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(h_shape, jnp.float32) if h is None else (),
        mesh=plgpu.Mesh(
            grid=(chunks, adapters.work.shape[2], modules.count),
            grid_names=("chunk", "block", "module"),
            cluster=(parts,),
            cluster_names=("part",),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name="lora",
    )(*operands, *(() if h is None else (h,)))
    if y is not None:
        y = operands[0][...].reshape(y.shape)
    return y, exchanged if h is None else h


def vector(ref: Any) -> jax.Array:
    """64 numbers, one a column of a WGMMA tile."""
    return plgpu.load(ref, layout=COLUMNS, optimized=False)
