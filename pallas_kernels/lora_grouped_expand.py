# SPDX-License-Identifier: Apache-2.0
"""LoRA of many tokens over paged adapters, the second half: see `lora_grouped.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import SLAB_RANKS, TILE, PageLayout, ceil_div
from pallas_kernels.lora_grouped import ROWS, Work
from pallas_kernels.lora_tiles import GROUPS, tile_rows, tiled_pool
from pallas_kernels.mosaic import SHARED_BYTES, WGMMA, accumulator, choose, swizzled
from pallas_kernels.segments import Adapters, Modules

SIZES = (64, 32, 16, 8, 4, 2, 1)  # rows of a copy: any count of tokens is a sum of them


@dataclass(frozen=True, slots=True)
class ExpandTuning:
    """Constants of `grouped_expand`.

    Attributes:
        width: outputs of a step: 64, 128 or 256; less where a module's outputs are no multiple.
        steps: of a CTA at most.
        y_stages: steps whose y a CTA has in flight, at most: as many as shared memory holds.
        b_stages: copies of B likewise.
        span: runs of 64 outputs that a slab's copy covers at most: 1, 2, 4 or 8. More make fewer
            copies; but a wgmma takes 8 / span slabs, and there are no more than it takes of ranks
            that large.
    """

    width: int
    steps: int
    y_stages: int
    b_stages: int
    span: int


def grouped_expand(
    y: jax.Array,
    h: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    adapters: Adapters,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: ExpandTuning,
) -> jax.Array:
    """`y + s · h Bᵀ` of every block, in place.

    A slab's copy is `8 * span` rows of a tile, `[(j, i), 64]`: ranks i of the run's outputs
    `64 * j ...`. `8 / span` slabs are one operand `[(slab, j, i), 64]`, and outputs j of it are its
    product with h that is zero but for j: `[token, (slab, j', i)]`. Those of all j are windows of
    one buffer, where `span - 1` times 8 rows of zeros come before, between and after the slabs'. h
    is two numbers of the model's dtype, high and low. Copying y is what takes the time.

    Args:
        h: of `grouped_shrink`.
    """
    dtype, layers, parts = pool.dtype, pool.shape[0], h.shape[2]
    line = jnp.int32(layers) if layer is None else layer
    width = gcd(tuning.width, *modules.outputs)
    groups = width // TILE
    most_slabs = ceil_div(max_rank, SLAB_RANKS)
    span = max(min(tuning.span, groups, 8 >> (most_slabs - 1).bit_length()), 1)
    slots, subs = 8 // span, groups // span  # slabs of an operand; operands of a step
    rows = span * SLAB_RANKS
    most_rounds = ceil_div(most_slabs, slots)
    computing = 2 if groups % 2 == 0 else 1  # warpgroups
    chunks = [ceil_div(n // width, tuning.steps) for n in modules.outputs]
    shares = [ceil_div(n // width, c) for n, c in zip(modules.outputs, chunks, strict=True)]
    h_rows = ROWS + (span - 1) * SLAB_RANKS
    b_stages, tile_bytes = tuning.b_stages, ROWS * TILE * dtype.itemsize
    others = b_stages * subs * tile_bytes + 2 * most_rounds * h_rows * ROWS * dtype.itemsize
    y_stages = min(tuning.y_stages, (SHARED_BYTES - others) // (groups * tile_bytes))

    def body(y_gmem, h_gmem, pool_gmem, line_gmem, work_gmem, scales, pages_gmem):
        block, chunk = lax.axis_index("block"), lax.axis_index("chunk")
        line = line_gmem[0]
        work = Work(work_gmem, line, modules, block)
        module, starts = jnp.int32(0), [sum(chunks[:m]) for m in range(modules.count)]
        for start in starts[1:]:
            module += (chunk >= start).astype(jnp.int32)
        slabs, first_slab = choose(module, work.slabs), choose(module, work.before[:-1])
        rounds = lax.div(slabs + (slots - 1), jnp.int32(slots))
        first_step = (chunk - choose(module, starts)) * choose(module, shares)
        left = choose(module, [n // width for n in modules.outputs]) - first_step
        steps = jnp.minimum(choose(module, shares), left)
        first_column = choose(module, [sum(modules.outputs[:m]) for m in range(modules.count)])

        def for_rows(do: Callable[[int, Any, Any], None]) -> None:
            """The block's rows in copies: calls `do(kind of copy, rows of y, rows in memory)`."""
            for kind, size in enumerate(SIZES):
                done = work.tokens & ~(2 * size - 1)

                @pl.when((work.tokens & size) != 0)
                def _(kind=kind, size=size, done=done):
                    do(kind, pl.ds(work.first_token + done, size), pl.ds(work.row + done, size))

        def columns(step: Any, group: int) -> Any:
            first = first_column + (first_step + step) * width + group * TILE
            return pl.ds(pl.multiple_of(first, TILE), TILE)

        def run(y_smem, b_smem, h_smem, y_ready, y_free, b_ready, b_free, h_ready):
            # Free to begin with, and again in the end: the loader may always wait for them.
            free = [y_free.at[stage] for stage in range(y_stages)]
            free += [b_free.at[stage] for stage in range(b_stages)]

            def load():
                stride = choose(module, [layout.slab_tiles(n) for n in modules.outputs])
                a_tiles = slabs * layout.slab_tiles(modules.inputs)
                aligned = jnp.int32(layout.copy_tiles)
                b_tile = choose(module, work.tiles)
                b_tile += lax.div(a_tiles + (aligned - 1), aligned) * aligned

                @pl.when(lax.rem(slabs, jnp.int32(slots)) != 0)
                def _():  # slots without a slab: zero times anything, but not times NaN
                    for stage in range(b_stages):
                        for sub in range(subs):
                            zeros = jnp.zeros((ROWS, TILE), dtype)
                            zeros = plgpu.layout_cast(zeros, WGMMA)
                            b_smem[stage, sub] = zeros
                    plgpu.commit_smem()

                @pl.loop(0, steps)
                def _(step):
                    y_stage = lax.rem(step, jnp.int32(y_stages))
                    plgpu.barrier_wait(y_free.at[y_stage])

                    def load_y(kind, rows_gmem, rows_smem):
                        for group in range(groups):
                            plgpu.copy_gmem_to_smem(
                                y_gmem.at[rows_gmem, columns(step, group)],
                                y_smem.at[y_stage, group, rows_smem],
                                y_ready.at[y_stage * len(SIZES) + kind],
                            )

                    for_rows(load_y)

                    @pl.loop(0, rounds)
                    def _(round_):
                        at = step * rounds + round_
                        stage = lax.rem(at, jnp.int32(b_stages))
                        plgpu.barrier_wait(b_free.at[stage])
                        for slot in range(slots):
                            slab = round_ * slots + slot

                            @pl.when(slab < slabs)
                            def _(slot=slot, slab=slab):
                                for sub in range(subs):
                                    group = (first_step + step) * groups + sub * span
                                    ahead = lax.div(group, jnp.int32(GROUPS))
                                    plgpu.copy_gmem_to_smem(
                                        tile_rows(
                                            pool_gmem,
                                            lambda n: pages_gmem[work.segment, n],
                                            line,
                                            b_tile + slab * stride + ahead,
                                            (group - ahead * GROUPS) * SLAB_RANKS,
                                            rows,
                                            spread=layer is None,
                                            layout=layout,
                                        ),
                                        b_smem.at[stage, sub, pl.ds(rows * slot, rows)],
                                        b_ready.at[stage * slots + slot],
                                    )

                for barrier in free:
                    plgpu.barrier_wait(barrier)

            def prepare_h():
                """Adds up the parts of h; high in `h_smem[0]`, low in `h_smem[1]`."""
                scale = scales[line, modules.first + module, block]

                def put(round_, row, high, low):
                    where = pl.ds(row, SLAB_RANKS)
                    h_smem.at[0, round_, where].transpose((1, 0))[...] = high
                    h_smem.at[1, round_, where].transpose((1, 0))[...] = low

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, SLAB_RANKS), dtype), WGMMA)

                @pl.loop(0, rounds)
                def _(round_):
                    for atom in range(h_rows // SLAB_RANKS):
                        slot, rest = divmod(atom - (span - 1), span)
                        slab = round_ * slots + slot
                        row = atom * SLAB_RANKS
                        used = slab < slabs if rest == 0 and slot >= 0 else jnp.bool(False)

                        @pl.when(used)
                        def _(slab=slab, row=row):
                            def part(p):
                                of_part = h_gmem.at[block, first_slab + slab, p]
                                return plgpu.load(of_part, layout=WGMMA, optimized=False)

                            total = part(0)
                            for p in range(1, parts):
                                total += part(p)
                            total *= scale
                            high = total.astype(dtype)
                            put(round_, row, high, (total - high.astype(jnp.float32)).astype(dtype))

                        pl.when(~used)(lambda row=row: put(round_, row, zeros, zeros))

                plgpu.commit_smem()

            def compute(warpgroup: int):
                for barrier in free:
                    plgpu.barrier_arrive(barrier)
                pl.when(jnp.bool(warpgroup == 0))(prepare_h)
                plgpu.barrier_arrive(h_ready)
                plgpu.barrier_wait(h_ready)
                own = groups // computing
                mine = range(warpgroup * own, warpgroup * own + own)

                @pl.loop(0, steps)
                def _(step):
                    def products(*accs):
                        @pl.loop(0, rounds)
                        def _(round_):
                            at = step * rounds + round_
                            stage = lax.rem(at, jnp.int32(b_stages))
                            for slot in range(slots):

                                @pl.when(round_ * slots + slot < slabs)
                                def _(slot=slot):
                                    plgpu.barrier_wait(b_ready.at[stage * slots + slot])

                            for group, acc in zip(mine, accs, strict=True):
                                sub, j = divmod(group, span)
                                window = pl.ds((span - 1 - j) * SLAB_RANKS, ROWS)
                                for low in range(2):
                                    plgpu.wgmma(
                                        acc,
                                        h_smem.at[low, round_, window].transpose((1, 0)),
                                        b_smem.at[stage, sub],
                                    )
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(b_free.at[stage])

                        return [acc[...] for acc in accs]

                    deltas = pl.run_scoped(products, *[accumulator(ROWS, TILE)] * own)
                    stage = lax.rem(step, jnp.int32(y_stages))
                    for_rows(
                        lambda kind, *_: plgpu.barrier_wait(y_ready.at[stage * len(SIZES) + kind])
                    )
                    for group, delta in zip(mine, deltas, strict=True):
                        ys = y_smem.at[stage, group]
                        ys[...] = (ys[...].astype(jnp.float32) + delta).astype(dtype)
                    plgpu.commit_smem()

                    def store_y(_kind, rows_gmem, rows_smem):
                        for group in mine:
                            plgpu.copy_smem_to_gmem(
                                y_smem.at[stage, group, rows_smem],
                                y_gmem.at[rows_gmem, columns(step, group)],
                                commit_group=False,
                            )

                    for_rows(store_y)
                    plgpu.commit_smem_to_gmem_group()

                    # The step before has left shared memory, while this one is leaving.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(y_free.at[lax.rem(step - 1, jnp.int32(y_stages))])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(y_free.at[lax.rem(steps - 1, jnp.int32(y_stages))])

            warpgroup = lax.axis_index("warpgroup")
            for w in range(computing):
                pl.when(warpgroup == w)(lambda w=w: compute(w))
            pl.when(warpgroup == computing)(load)

        @pl.when((work.tokens > 0) & (slabs > 0) & (steps > 0))
        def _():
            pl.run_scoped(
                run,
                plgpu.SMEM((y_stages, groups, ROWS, TILE), dtype, transforms=swizzled(rows=1)),
                plgpu.SMEM((b_stages, subs, ROWS, TILE), dtype, transforms=swizzled()),
                plgpu.SMEM((2, most_rounds, h_rows, ROWS), dtype, transforms=swizzled()),
                plgpu.Barrier(num_arrivals=groups, num_barriers=y_stages * len(SIZES)),
                plgpu.Barrier(num_arrivals=computing, num_barriers=y_stages),
                plgpu.Barrier(num_arrivals=subs, num_barriers=b_stages * slots),
                plgpu.Barrier(num_arrivals=computing, num_barriers=b_stages),
                plgpu.Barrier(num_arrivals=computing),
                collective_axes="warpgroup",
            )

    result = jax.new_ref(y)
    pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(adapters.work.shape[2], sum(chunks)),
            grid_names=("block", "chunk"),
            num_threads=computing + 1,
            thread_name="warpgroup",
        ),
        name="lora_grouped_expand",
    )(
        result,
        h,  # pyright: ignore[reportCallIssue]
        tiled_pool(pool, layout),
        line.reshape(1),
        adapters.work,
        adapters.work_scale,
        adapters.pages,
    )
    return result[...]
