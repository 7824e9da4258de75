# SPDX-License-Identifier: Apache-2.0
"""LoRA of many tokens over paged adapters, the first half: a Mosaic GPU kernel.

The grouped form, for prefill: a line of work is a block of tokens, rows of a wgmma. A
block lies in 64 rows that start at a multiple of 8, as the swizzle of shared memory does, so it
must be cut there: `first_token % 8 + tokens <= 64`. Between the halves h lies in memory as float32
parts, one of each split of the inputs, slab by slab; the slabs of a block are counted through the
modules. `lora_grouped_expand.py` is the other half. Where h is to leave the blocks in between,
`of_tokens` and `of_blocks` are the way out and in again.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import SLAB_RANKS, TILE, TILE_COLUMNS, PageLayout, ceil_div
from pallas_kernels.lora_tiles import GROUPS, tile_rows, tiled_pool
from pallas_kernels.mosaic import accumulator, choose, swizzled
from pallas_kernels.segments import Modules, Work

ROWS = 64  # of a wgmma, in which a block lies
SLOTS = 8  # slabs that shrink sums at a time


@dataclass(frozen=True, slots=True)
class ShrinkTuning:
    """Constants of `grouped_shrink`.

    Attributes:
        parts: CTAs that share a block, each a run of the inputs.
        stages: steps that a CTA has in flight.
        groups: runs of 64 inputs in a step: 1, 2, 4 or 8.
    """

    parts: int
    stages: int
    groups: int = 4


class Block:
    """A line of work, read by every thread."""

    def __init__(self, lines: Any, line: Any, modules: Modules, number: Any):
        first = modules.first
        self.first_token, self.tokens, _, _, self.segment = (
            lines[line, first, number, field] for field in range(5)
        )
        self.slabs = [lines[line, first + m, number, 2] for m in range(modules.count)]
        self.tiles = [lines[line, first + m, number, 3] for m in range(modules.count)]
        self.base = _base(self.first_token)
        self.row = self.first_token - self.base

    @property
    def before(self) -> list[Any]:
        """Slabs before those of each module, and their sum."""
        sums = [jnp.int32(0)]
        for count in self.slabs:
            sums.append(sums[-1] + count)
        return sums


def grouped_shrink(
    x: jax.Array,
    pool: jax.Array,
    layer: jax.Array | None,
    work: Work,
    pages: jax.Array,
    *,
    modules: Modules,
    max_rank: int,
    layout: PageLayout,
    tuning: ShrinkTuning,
) -> jax.Array:
    """`x Aᵀ` of every block, in parts.

    The 8 rows of a tile that hold a slab's ranks of 64 inputs are gathered from 8 slabs into one
    operand: `[64 tokens, 64 inputs]` times that is h of 8 slabs. So x is read from shared memory
    once for all of them. What no slab fills are columns that nobody reads.

    Returns:
        `[blocks, slabs, parts, 64, 8]`: row r is the token `base + r` (`Block.base`). Only slabs in
        use are written; rows that belong to no token of the block hold anything.
    """
    dtype, layers = pool.dtype, pool.shape[0]
    line = jnp.int32(layers) if layer is None else layer
    parts, stages, groups = tuning.parts, tuning.stages, tuning.groups
    width = groups * TILE
    all_steps = ceil_div(modules.inputs, width)
    share = ceil_div(all_steps, parts)

    def body(x_gmem, pool_gmem, line_gmem, lines, pages_gmem, h_gmem):
        number, part = lax.axis_index("block"), lax.axis_index("part")
        line = line_gmem[0]
        block = Block(lines, line, modules, number)
        before = block.before
        rounds = lax.div(before[-1] + (SLOTS - 1), jnp.int32(SLOTS))
        first_step = part * share
        steps = jnp.clip(all_steps - first_step, 0, share)

        def run(x_smem, a_smem, x_ready, a_ready, free):
            def load():
                @pl.loop(0, rounds)
                def _(round_):
                    @pl.loop(0, steps)
                    def _(step):
                        at = round_ * steps + step
                        stage = lax.rem(at, jnp.int32(stages))
                        column = (first_step + step) * width
                        plgpu.barrier_wait(free.at[stage])
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[
                                pl.ds(pl.multiple_of(block.base, 8), ROWS),
                                pl.ds(pl.multiple_of(column, width), width),
                            ],
                            x_smem.at[stage],
                            x_ready.at[stage],
                        )
                        for slot in range(SLOTS):
                            slab = round_ * SLOTS + slot

                            @pl.when(slab < before[-1])
                            def _(slot=slot, slab=slab):
                                module = jnp.int32(0)
                                for end in before[1:-1]:
                                    module += (slab >= end).astype(jnp.int32)
                                stride = layout.slab_tiles(modules.inputs)
                                tile = choose(module, block.tiles)
                                tile += (slab - choose(module, before[:-1])) * stride
                                ahead = lax.div(column, jnp.int32(TILE_COLUMNS))
                                first_row = lax.div(
                                    column - ahead * TILE_COLUMNS, jnp.int32(GROUPS)
                                )
                                for j in range(groups):
                                    ranks = tile_rows(
                                        pool_gmem,
                                        lambda n: pages_gmem[block.segment, n],
                                        line,
                                        tile + ahead,
                                        first_row + SLAB_RANKS * j,
                                        SLAB_RANKS,
                                        spread=layer is None,
                                        layout=layout,
                                    )
                                    where = pl.ds(SLAB_RANKS * slot, SLAB_RANKS)
                                    plgpu.copy_gmem_to_smem(
                                        ranks,
                                        a_smem.at[stage, j, where],
                                        a_ready.at[stage * SLOTS + slot],
                                    )

                for stage in range(stages):
                    plgpu.barrier_wait(free.at[stage])

            def compute():
                for stage in range(stages):
                    plgpu.barrier_arrive(free.at[stage])

                @pl.loop(0, rounds)
                def _(round_):
                    here = before[-1] - round_ * SLOTS

                    def products(acc):
                        @pl.loop(0, steps)
                        def _(step):
                            stage = lax.rem(round_ * steps + step, jnp.int32(stages))
                            plgpu.barrier_wait(x_ready.at[stage])
                            for slot in range(SLOTS):

                                @pl.when(slot < here)
                                def _(slot=slot):
                                    plgpu.barrier_wait(a_ready.at[stage * SLOTS + slot])

                            for j in range(groups):
                                xs = x_smem.at[stage, :, pl.ds(TILE * j, TILE)]
                                plgpu.wgmma(acc, xs, a_smem.at[stage, j].transpose((1, 0)))
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(free.at[stage])

                        return acc[...]

                    h = pl.run_scoped(products, accumulator(ROWS, SLOTS * SLAB_RANKS))
                    for slot in range(SLOTS):
                        columns = h[:, SLAB_RANKS * slot : SLAB_RANKS * (slot + 1)]

                        @pl.when(slot < here)
                        def _(slot=slot, columns=columns):
                            h_gmem[number, round_ * SLOTS + slot, part] = columns

            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == 0)(compute)
            pl.when(warpgroup == 1)(load)

        @pl.when((block.tokens > 0) & (before[-1] > 0))
        def _():
            pl.run_scoped(
                run,
                plgpu.SMEM((stages, ROWS, width), dtype, transforms=swizzled()),
                plgpu.SMEM(
                    (stages, groups, SLOTS * SLAB_RANKS, TILE), dtype, transforms=swizzled()
                ),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=groups, num_barriers=stages * SLOTS),
                plgpu.Barrier(num_barriers=stages),
                collective_axes="warpgroup",
            )

    missing = -x.shape[0] % 8  # rows are copied 8 at a time
    x = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    blocks = work.lines.shape[2]
    slabs = modules.count * ceil_div(max_rank, SLAB_RANKS)
    return pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks, slabs, parts, ROWS, SLAB_RANKS), jnp.float32),
        mesh=plgpu.Mesh(
            grid=(blocks, parts),
            grid_names=("block", "part"),
            num_threads=2,
            thread_name="warpgroup",
        ),
        name="lora_grouped_shrink",
    )(x, tiled_pool(pool, layout), line.reshape(1), work.lines, pages)  # pyright: ignore[reportCallIssue]


def of_tokens(
    h: jax.Array,
    layer: jax.Array | None,
    work: Work,
    *,
    modules: Modules,
    tokens: int,
    max_rank: int,
) -> jax.Array:
    """h of blocks, as `grouped_shrink` gives it, summed and token by token.

    Returns:
        `[T, M, R]`. Slabs past a module's rank, and all of a token that has no adapter, hold
        anything, NaN as well.
    """
    first, size, slabs = _lines(layer, work, modules)
    token = jnp.arange(tokens)
    inside = (token[:, None] >= first) & (token[:, None] < first + size)
    block = jnp.argmax(inside, axis=1)
    before = jnp.cumsum(slabs, axis=1) - slabs  # [blocks, M]
    slab = before[block][:, :, None] + jnp.arange(ceil_div(max_rank, SLAB_RANKS))  # [T, M, slab]
    row = token - _base(first)[block]
    where = block[:, None, None], slab, row[:, None, None]
    ranks = h.sum(axis=2).at[where].get(mode="clip")
    return ranks.reshape(tokens, modules.count, -1)[:, :, :max_rank]


def of_blocks(h: jax.Array, layer: jax.Array | None, work: Work, *, modules: Modules) -> jax.Array:
    """`[T, M, R]` block by block, as `grouped_expand` wants it, in one part."""
    count, max_rank = h.shape[1:]
    most_slabs = ceil_div(max_rank, SLAB_RANKS)
    h = jnp.pad(h, ((0, 0), (0, 0), (0, most_slabs * SLAB_RANKS - max_rank)))
    h = h.reshape(-1, count, most_slabs, SLAB_RANKS)
    first, _, slabs = _lines(layer, work, modules)
    index, ends = jnp.arange(count * most_slabs), jnp.cumsum(slabs, axis=1)
    module = (index >= ends[:, :, None]).sum(axis=1)  # [blocks, slab]
    slab = index - jnp.take_along_axis(ends - slabs, module, axis=1, mode="clip")
    token = _base(first)[:, None] + jnp.arange(ROWS)
    return h.at[token[:, None], module[:, :, None], slab[:, :, None]].get(mode="clip")[:, :, None]


def _lines(layer: jax.Array | None, work: Work, modules: Modules) -> tuple[Any, Any, Any]:
    """First token and tokens of each block, and the slabs `[blocks, M]` of its modules."""
    line = work.lines[-1 if layer is None else layer, modules.places]
    return line[0, :, 0], line[0, :, 1], line[:, :, 2].T


def _base(first_token: Any) -> Any:
    """The token in row 0 of a block: copies start at multiples of 8."""
    return lax.div(first_token, jnp.int32(8)) * 8
