# SPDX-License-Identifier: Apache-2.0
"""LoRA of many tokens over paged adapters, the second half: see `lora_grouped.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import SLAB_RANKS, TILE, PageLayout, ceil_div
from pallas_kernels.lora_grouped import ROWS, Block
from pallas_kernels.lora_tiles import GROUPS, tile_rows, tiled_pool
from pallas_kernels.mosaic import SHARED_BYTES, WGMMA, accumulator, choose, swizzled
from pallas_kernels.segments import Modules, Work

SIZES = (64, 32, 16, 8, 4, 2, 1)  # rows of a copy: any count of tokens is a sum of them


@dataclass(frozen=True, slots=True)
class ExpandTuning:
    """Constants of `grouped_expand`.

    Attributes:
        width: outputs of a step: 64, 128 or 256; less where a module's outputs are no multiple.
        ctas: as many as the GPU has room for at a time.
        y_stages: steps whose y a CTA has in flight, at most: as many as shared memory holds.
        b_stages: copies of B likewise.
        span: runs of 64 outputs that a slab's copy covers at most: 1, 2, 4 or 8. More make fewer
            copies; but a wgmma takes 8 / span slabs, and there are no more than it takes of ranks
            that large.
    """

    width: int
    ctas: int
    y_stages: int
    b_stages: int
    span: int


def grouped_expand(
    y: jax.Array,
    h: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: ExpandTuning,
) -> jax.Array:
    """`y + s · h Bᵀ` of every block, in place.

    The steps of all blocks, one after another, are dealt out to the CTAs in equal shares: a step
    without more than copying y to do may be the only one of many CTAs, or one of many. What a CTA
    does of one module of one block is a run: it has h at hand for all of it. Loads run ahead across
    runs.

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
    steps_of = [n // width for n in modules.outputs]
    steps_before = [sum(steps_of[:m]) for m in range(modules.count)]
    ctas = min(tuning.ctas, work.lines.shape[2] * sum(steps_of))
    h_rows = ROWS + (span - 1) * SLAB_RANKS
    b_stages, tile_bytes = tuning.b_stages, ROWS * TILE * dtype.itemsize
    others = b_stages * subs * tile_bytes + 2 * most_rounds * h_rows * ROWS * dtype.itemsize
    y_stages = min(tuning.y_stages, (SHARED_BYTES - others) // (groups * tile_bytes))

    def body(y_gmem, h_gmem, pool_gmem, line_gmem, lines, scales, count, pages_gmem):
        line = line_gmem[0]
        all_steps = count[0] * sum(steps_of)
        share = lax.div(all_steps + (ctas - 1), jnp.int32(ctas))
        first = jnp.minimum(lax.axis_index("cta") * share, all_steps)
        last = jnp.minimum(first + share, all_steps)

        def run_at(step: Any) -> Any:
            block = lax.div(step, jnp.int32(sum(steps_of)))
            module = jnp.int32(0)
            for before in steps_before[1:]:
                module += (step - block * sum(steps_of) >= before).astype(jnp.int32)
            return block * modules.count + module

        class Run:
            """Some steps of a module of a block; none if the module is not adapted."""

            def __init__(self, number: Any):
                self.number = lax.div(number, jnp.int32(modules.count))
                self.module = number - self.number * modules.count
                self.block = Block(lines, line, modules, self.number)
                self.slabs = choose(self.module, self.block.slabs)
                self.first_slab = choose(self.module, self.block.before[:-1])
                self.rounds = lax.div(self.slabs + (slots - 1), jnp.int32(slots))
                begin = self.number * sum(steps_of) + choose(self.module, steps_before)
                self.first_step = jnp.maximum(first - begin, 0)
                steps = jnp.minimum(last - begin, choose(self.module, steps_of)) - self.first_step
                self.steps = jnp.where(self.slabs > 0, steps, 0)

            def columns(self, step: Any, group: int) -> Any:
                """Of y."""
                start = choose(self.module, [before * width for before in steps_before])
                start += (self.first_step + step) * width + group * TILE
                return pl.ds(pl.multiple_of(start, TILE), TILE)

            def for_rows(self, do: Callable[[int, Any, Any], None]) -> None:
                """The block's rows in copies: calls `do(kind of copy, rows of y, in memory)`."""
                for kind, size in enumerate(SIZES):
                    done = self.block.tokens & ~(2 * size - 1)

                    @pl.when((self.block.tokens & size) != 0)
                    def _(kind=kind, size=size, done=done):
                        rows_gmem = pl.ds(self.block.first_token + done, size)
                        do(kind, rows_gmem, pl.ds(self.block.row + done, size))

        def for_runs(do: Callable[[Run, Any, Any], None]) -> None:
            """Calls `do(run, steps before it, copies of B before it)`."""

            def one(number, before):
                steps, copies = before
                run = Run(number)
                do(run, steps, copies)
                return steps + run.steps, copies + run.steps * run.rounds

            end = jnp.where(last > first, run_at(last - 1) + 1, 0)
            lax.fori_loop(run_at(first), end, one, (jnp.int32(0), jnp.int32(0)))

        def threads(y_smem, b_smem, h_smem, y_ready, y_free, b_ready, b_free, h_ready, h_free):
            # Free to begin with, and again in the end: the loader may always wait for them.
            free = [y_free.at[stage] for stage in range(y_stages)]
            free += [b_free.at[stage] for stage in range(b_stages)]

            def load(run: Run, steps_done: Any, copies_done: Any) -> None:
                block, slabs = run.block, run.slabs
                stride = choose(run.module, [layout.slab_tiles(n) for n in modules.outputs])
                a_tiles = slabs * layout.slab_tiles(modules.inputs)
                aligned = jnp.int32(layout.copy_tiles)
                b_tile = choose(run.module, block.tiles)
                b_tile += lax.div(a_tiles + (aligned - 1), aligned) * aligned

                @pl.loop(0, run.steps)
                def _(step):
                    y_stage = lax.rem(steps_done + step, jnp.int32(y_stages))
                    plgpu.barrier_wait(y_free.at[y_stage])

                    def load_y(kind, rows_gmem, rows_smem):
                        for group in range(groups):
                            plgpu.copy_gmem_to_smem(
                                y_gmem.at[rows_gmem, run.columns(step, group)],
                                y_smem.at[y_stage, group, rows_smem],
                                y_ready.at[y_stage * len(SIZES) + kind],
                            )

                    run.for_rows(load_y)

                    @pl.loop(0, run.rounds)
                    def _(round_):
                        at = copies_done + step * run.rounds + round_
                        stage = lax.rem(at, jnp.int32(b_stages))
                        plgpu.barrier_wait(b_free.at[stage])

                        @pl.when((round_ + 1) * slots > slabs)
                        def _():  # slots without a slab: zero times anything, but not times NaN
                            for sub in range(subs):
                                zeros = jnp.zeros((ROWS, TILE), dtype)
                                b_smem[stage, sub] = plgpu.layout_cast(zeros, WGMMA)
                            plgpu.commit_smem()

                        for slot in range(slots):
                            slab = round_ * slots + slot

                            @pl.when(slab < slabs)
                            def _(slot=slot, slab=slab):
                                for sub in range(subs):
                                    group = (run.first_step + step) * groups + sub * span
                                    ahead = lax.div(group, jnp.int32(GROUPS))
                                    plgpu.copy_gmem_to_smem(
                                        tile_rows(
                                            pool_gmem,
                                            lambda n: pages_gmem[block.segment, n],
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

            def load_all() -> None:
                for_runs(load)
                for barrier in free:
                    plgpu.barrier_wait(barrier)

            def prepare_h(run: Run) -> None:
                """Adds up the parts of h; high in `h_smem[0]`, low in `h_smem[1]`."""
                scale = scales[line, modules.first + run.module, run.number]

                def put(round_, row, high, low):
                    where = pl.ds(row, SLAB_RANKS)
                    h_smem.at[0, round_, where].transpose((1, 0))[...] = high
                    h_smem.at[1, round_, where].transpose((1, 0))[...] = low

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, SLAB_RANKS), dtype), WGMMA)

                @pl.loop(0, run.rounds)
                def _(round_):
                    for atom in range(h_rows // SLAB_RANKS):
                        slot, rest = divmod(atom - (span - 1), span)
                        slab = round_ * slots + slot
                        row = atom * SLAB_RANKS
                        used = slab < run.slabs if rest == 0 and slot >= 0 else jnp.bool(False)

                        @pl.when(used)
                        def _(slab=slab, row=row):
                            def part(p):
                                of_part = h_gmem.at[run.number, run.first_slab + slab, p]
                                return plgpu.load(of_part, layout=WGMMA, optimized=False)

                            total = part(0)
                            for p in range(1, parts):
                                total += part(p)
                            total *= scale
                            high = total.astype(dtype)
                            put(round_, row, high, (total - high.astype(jnp.float32)).astype(dtype))

                        pl.when(~used)(lambda row=row: put(round_, row, zeros, zeros))

                plgpu.commit_smem()

            def compute(warpgroup: int, run: Run, steps_done: Any, copies_done: Any) -> None:
                plgpu.barrier_arrive(h_free)

                @pl.when(jnp.bool(warpgroup == 0))
                def _():
                    plgpu.barrier_wait(h_free)
                    prepare_h(run)

                plgpu.barrier_arrive(h_ready)
                plgpu.barrier_wait(h_ready)
                own = groups // computing
                mine = range(warpgroup * own, warpgroup * own + own)

                @pl.loop(0, run.steps)
                def _(step):
                    def products(*accs):
                        @pl.loop(0, run.rounds)
                        def _(round_):
                            at = copies_done + step * run.rounds + round_
                            stage = lax.rem(at, jnp.int32(b_stages))
                            for slot in range(slots):

                                @pl.when(round_ * slots + slot < run.slabs)
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
                    stage = lax.rem(steps_done + step, jnp.int32(y_stages))
                    run.for_rows(
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
                                y_gmem.at[rows_gmem, run.columns(step, group)],
                                commit_group=False,
                            )

                    run.for_rows(store_y)
                    plgpu.commit_smem_to_gmem_group()

                    # The step before has left shared memory, while this one is leaving.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                    @pl.when(step > 0)
                    def _():
                        before = lax.rem(steps_done + step - 1, jnp.int32(y_stages))
                        plgpu.barrier_arrive(y_free.at[before])

                @pl.when(run.steps > 0)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    end = lax.rem(steps_done + run.steps - 1, jnp.int32(y_stages))
                    plgpu.barrier_arrive(y_free.at[end])

            def compute_all(warpgroup: int) -> None:
                for barrier in free:
                    plgpu.barrier_arrive(barrier)
                for_runs(partial(compute, warpgroup))

            warpgroup = lax.axis_index("warpgroup")
            for w in range(computing):
                pl.when(warpgroup == w)(partial(compute_all, w))
            pl.when(warpgroup == computing)(load_all)

        @pl.when(last > first)
        def _():
            pl.run_scoped(
                threads,
                plgpu.SMEM((y_stages, groups, ROWS, TILE), dtype, transforms=swizzled(rows=1)),
                plgpu.SMEM((b_stages, subs, ROWS, TILE), dtype, transforms=swizzled()),
                plgpu.SMEM((2, most_rounds, h_rows, ROWS), dtype, transforms=swizzled()),
                plgpu.Barrier(num_arrivals=groups, num_barriers=y_stages * len(SIZES)),
                plgpu.Barrier(num_arrivals=computing, num_barriers=y_stages),
                plgpu.Barrier(num_arrivals=subs, num_barriers=b_stages * slots),
                plgpu.Barrier(num_arrivals=computing, num_barriers=b_stages),
                plgpu.Barrier(num_arrivals=computing),
                plgpu.Barrier(num_arrivals=computing),
                collective_axes="warpgroup",
            )

    result = jax.new_ref(y)
    pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(ctas,),
            grid_names=("cta",),
            num_threads=computing + 1,
            thread_name="warpgroup",
        ),
        name="lora_grouped_expand",
    )(
        result,
        h,  # pyright: ignore[reportCallIssue]
        tiled_pool(pool, layout),
        line.reshape(1),
        work.lines,
        work.scale,
        work.count,
        pages,
    )
    return result[...]
