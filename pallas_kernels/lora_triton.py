# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of LoRA: each line of a step's list of work, for single tokens and for blocks.

Single tokens have a slab times a vector, a sum of products that waits for memory only. A tile's
columns are dealt out to threads 16 bytes at a time, and each thread has all 8 ranks of its columns:
what it adds up over ranks stays in its registers, and as many reads as ranks are under way at once.
Blocks of tokens have matrix products, whose operands are gathered from the tiles' rows. Between the
halves h is float32, in the order of the tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl

from pallas_kernels.layout import SLAB_RANKS, TILE_COLUMNS, PageLayout, ceil_div, round_up
from pallas_kernels.segments import PAGES_AT_HAND, Modules, Work
from pallas_kernels.triton import jit, launch, power_of_two, scalar, stages

LEAST_RANKS = 16  # of an operand of `tl.dot`, so two slabs


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels split their work.

    Attributes:
        shrink_tiles: of A, that a program for a single token asks for at once.
        expand_tiles: of each slab of B, whose columns a program for a single token has.
        expand_slabs: whose tiles it asks for at once.
        shrink_warps, expand_warps: of such programs. Two of them cover a tile's columns, 16 bytes
            each thread.
        block_tokens: of a program that shrinks a block of tokens, or a part of one.
        block_inputs: columns of x in a step of it.
        block_shrink_ranks: most ranks, of all modules, of its matrix product.
        block_shrink_warps, stages: of such a program, and of its loop's pipeline.
        block_outputs: columns of y of a program for a block of tokens.
        block_expand_ranks, block_expand_warps: the same of it.
    """

    shrink_tiles: int = 1
    shrink_warps: int = 2
    expand_tiles: int = 1
    expand_slabs: int = 1
    expand_warps: int = 2
    block_tokens: int = 64
    block_inputs: int = 128
    block_shrink_ranks: int = 64
    block_shrink_warps: int = 4
    stages: int = 3
    block_outputs: int = 128
    block_expand_ranks: int = 32
    block_expand_warps: int = 4


TUNING = {
    # On an H200, us of shrink + expand, q, k, v at hidden 4096, of 64 tokens on 64 adapters of rank
    # 16 / of ranks 8 to 64 (by the clock: of those near 10 some may be the host's launching):
    # 10.6 + 9.2 / 15.1 + 17.1. Shrink of 4 tiles at once 10.6 / 16.1, of 8
    # 17.4 / 22.5, by 1 warp 11.8 / 21.9, of 2 by 4 warps 9.8 / 16.2. Expand of 2 slabs at once
    # 9.5 / 16.2, of 2 tiles 11.8 / 16.8, by 1 warp 9.3 / 16.5, of 2 tiles by 4 warps 21.7 / 77.7.
    # Of 4096 tokens of 8 adapters of rank 16: shrink 20.3, of 32 tokens 30.8, in steps of 256
    # inputs by 8 warps 20.3, in 2 stages 34.7; expand 84.3, of 64 outputs by 2 warps 112.5, of 128
    # by 8 192.2, of 256 80.9, whose registers spill.
    80: Tuning(),
}


def shrink(x, pool, layer, work: Work, pages, *, modules: Modules, max_rank, layout, tuning):
    """`h = x Aᵀ` of the tokens of a list of work.

    Returns:
        `[T, M, R]`, float32. What lies past a module's slabs, and other tokens' h, may be anything.
    """
    tokens = x.shape[0]
    static = _static(pool, layer, work, pages, modules, layout)
    static |= {"INPUTS": modules.inputs, "SLAB_TILES": layout.slab_tiles(modules.inputs)}
    static |= {"AT_HAND": _at_hand(max_rank, modules.inputs, 0, layer, layout), "RANKS": max_rank}
    arrays = x, pool, _layer(layer), work.lines, pages
    h = jax.ShapeDtypeStruct((tokens, modules.count, max_rank), jnp.float32)
    lines = work.lines.shape[2]
    if work.block == 1:
        slabs, tiles = ceil_div(max_rank, SLAB_RANKS), ceil_div(modules.inputs, TILE_COLUMNS)
        options: dict[str, Any] = {"num_warps": tuning.shrink_warps, "SLABS": slabs}
        options |= {"AT_ONCE": min(tuning.shrink_tiles, power_of_two(tiles))}
        grid = (lines, modules.count * slabs)
        return launch(_shrink_single, *arrays, out_type=[h], grid=grid, **options, **static)
    # The ranks of all modules side by side: x is read once for all of them.
    all_ranks = modules.count * round_up(max_rank, SLAB_RANKS)
    ranks = _block_ranks(all_ranks, tuning.block_shrink_ranks)
    size = min(tuning.block_tokens, work.block)
    options: dict[str, Any] = {
        "num_warps": tuning.block_shrink_warps,
        "num_stages": stages(tuning.stages, step=2 * tuning.block_inputs * (size + ranks)),
        "TOKENS": size,
        "STEP": tuning.block_inputs,
        "RANK_BLOCK": ranks,
    }
    grid = (lines, ceil_div(work.block, size), ceil_div(all_ranks, ranks))
    return launch(_shrink_block, *arrays, out_type=[h], grid=grid, **options, **static)


def expand(y, h, pool, layer, work: Work, pages, *, modules: Modules, layout, tuning):
    """`y + s · h Bᵀ` of the tokens of a list of work; y of the others stays as it is."""
    max_rank, widest = h.shape[2], max(modules.outputs)
    static = _static(pool, layer, work, pages, modules, layout)
    static |= {"A_TILES": layout.slab_tiles(modules.inputs), "COPY": layout.copy_tiles}
    static |= {"AT_HAND": _at_hand(max_rank, modules.inputs, widest, layer, layout)}
    # What numbers of columns are multiples of, for wide loads: of 16 bytes there is no wider.
    align = math.gcd(8, *modules.outputs)
    static |= {"RANKS": max_rank, "WIDTH": y.shape[1], "ALIGN": align}
    begin = np.cumsum((0, *modules.outputs[:-1]))
    slab_tiles = [layout.slab_tiles(columns) for columns in modules.outputs]
    places = jnp.asarray(np.stack([modules.outputs, begin, slab_tiles], axis=1), jnp.int32)
    arrays = h, pool, _layer(layer), work.lines, work.scale, pages, places
    lines = work.lines.shape[2]
    if work.block == 1:
        columns = tuning.expand_tiles * TILE_COLUMNS
        slabs = min(tuning.expand_slabs, power_of_two(ceil_div(max_rank, SLAB_RANKS)))
        options: dict[str, Any] = {"num_warps": tuning.expand_warps}
        options |= {"TILES": tuning.expand_tiles, "AT_ONCE": slabs}
        grid = (lines, ceil_div(widest, columns), modules.count)
        return launch(_expand_single, *arrays, updated=y, grid=grid, **options, **static)
    options: dict[str, Any] = {
        "num_warps": tuning.block_expand_warps,
        "num_stages": 1,
        "TOKENS": work.block,
        "COLUMNS": tuning.block_outputs,
        "RANK_BLOCK": _block_ranks(max_rank, tuning.block_expand_ranks),
    }
    grid = (lines, ceil_div(widest, tuning.block_outputs), modules.count)
    return launch(_expand_block, *arrays, updated=y, grid=grid, **options, **static)


def _static(pool, layer, work: Work, pages, modules: Modules, layout: PageLayout) -> dict[str, Any]:
    all_modules, lines = work.lines.shape[1:3]
    return {
        "LAYERLESS": layer is None,
        "LAYERS": pool.shape[0],
        "PAGES": pool.shape[1],
        "PAGE_TILES": layout.tiles_per_page,
        "ADAPTER_PAGES": pages.shape[1],
        "LINES": lines,
        "ALL_MODULES": all_modules,
        "FIRST_MODULE": modules.first,
        "MODULES": modules.count,
    }


def _layer(layer) -> jax.Array:
    return scalar(jnp.int32(0) if layer is None else layer)


def _block_ranks(max_rank: int, most: int) -> int:
    return min(power_of_two(max(max_rank, LEAST_RANKS)), most)


def _at_hand(max_rank: int, inputs: int, outputs: int, layer, layout: PageLayout) -> bool:
    """Whether a line of work names all pages of such a module: one read less to wait for."""
    slabs = ceil_div(max_rank, SLAB_RANKS)
    tiles = slabs * (layout.slab_tiles(inputs) + (layout.slab_tiles(outputs) if outputs else 0))
    gap = layout.copy_tiles - 1  # between A and B
    # In its first page a module may have one tile. Tensors of no layer are few.
    return layer is not None and ceil_div(tiles + gap - 1, layout.tiles_per_page) < PAGES_AT_HAND


@jit
def _read_line(
    lines,
    pages,
    layer,
    module,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    ADAPTER_PAGES: tl.constexpr,
    LINES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
):
    """This program's line of work, of a layer and module: see `segments.Work`.

    Returns:
        Its number, first token, tokens, slabs, first tile, its adapter's pages, and the three that
        are at hand.
    """
    at = LAYERS if LAYERLESS else layer  # the modules of no layer are past the last
    number = (at * ALL_MODULES + module) * LINES + tl.program_id(0)
    line = lines + number * 8
    token, size, slabs = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    first, pages = tl.load(line + 3), pages + tl.load(line + 4) * ADAPTER_PAGES
    page0, page1, page2 = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    return number, token, size, slabs, first, pages, page0, page1, page2


@jit
def _tile(
    tile,
    first,
    page0,
    page1,
    page2,
    pages,
    layer,
    mask,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    AT_HAND: tl.constexpr,
):
    """Where an adapter's tiles begin in the pool, in tiles: their elements need 64 bits.

    Args:
        first: tile of the module, which lies in page0.
    """
    slot = tile // PAGE_TILES
    if AT_HAND:
        number = slot - first // PAGE_TILES
        page = tl.where(number == 0, page0, tl.where(number == 1, page1, page2))
        found = (layer * PAGES + page) * PAGE_TILES
    elif LAYERLESS:
        # The tensors that belong to no layer fill a page in all layers before they go on.
        page = tl.load(pages + slot // LAYERS, mask=mask, other=0)
        found = (slot % LAYERS * PAGES + page) * PAGE_TILES
    else:
        found = (layer * PAGES + tl.load(pages + slot, mask=mask, other=0)) * PAGE_TILES
    return found + tile % PAGE_TILES


@jit
def _shrink_single(
    x,
    pool,
    layer,
    lines,
    pages,
    h,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    ADAPTER_PAGES: tl.constexpr,
    LINES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    AT_HAND: tl.constexpr,
    INPUTS: tl.constexpr,
    SLAB_TILES: tl.constexpr,
    RANKS: tl.constexpr,
    SLABS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A slab of A times a token's x."""
    TILES: tl.constexpr = (INPUTS + 511) // 512
    layer = tl.load(layer)
    module, slab = tl.program_id(1) // SLABS, tl.program_id(1) % SLABS
    _, token, size, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    if (size > 0) & (slab < slabs):
        rank, number = tl.arange(0, 8), tl.arange(0, AT_ONCE)[:, None]
        column = tl.arange(0, 512)
        within = (column // 64 * 512 + column % 64) + (rank * 64)[:, None, None]
        total = tl.zeros([8, 512], tl.float32)
        for start in range(0, TILES, AT_ONCE):
            tile = start + number
            at = _tile(
                first + slab * SLAB_TILES + tile, first, page0, page1, page2, pages, layer,
                tile < TILES, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
            )  # fmt: skip
            own = pool + at.to(tl.int64)[None] * 4096 + within
            a = tl.load(own, mask=(tile < TILES)[None], other=0.0)
            # All reads of A are under way before x, which every sum needs, is read: the compiler
            # would start to add, and wait, in between.
            tl.debug_barrier()
            source = tile * 512 + column
            mine = tl.load(x + token * INPUTS + source, mask=source < INPUTS, other=0.0)
            total += tl.sum(a.to(tl.float32) * mine.to(tl.float32)[None], 1)
        ranks = slab * 8 + rank
        target = h + (token * MODULES + module) * RANKS + ranks
        tl.store(target, tl.sum(total, 1), mask=ranks < RANKS)


@jit
def _expand_single(
    y,
    h,
    pool,
    layer,
    lines,
    scales,
    pages,
    places,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    ADAPTER_PAGES: tl.constexpr,
    LINES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    AT_HAND: tl.constexpr,
    A_TILES: tl.constexpr,
    COPY: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Some tiles' columns of all slabs of B, times a token's h."""
    layer = tl.load(layer)
    module = tl.program_id(2)
    work, token, size, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    scale = tl.load(scales + work)
    place = places + module * 3
    columns, begin = (
        tl.multiple_of(tl.load(place), ALIGN),
        tl.multiple_of(tl.load(place + 1), ALIGN),
    )
    slab_tiles = tl.load(place + 2)
    first_b = first + tl.cdiv(slabs * A_TILES, COPY) * COPY
    if (size > 0) & (slabs > 0) & (tl.program_id(1) * TILES * 512 < columns):
        # Threads are dealt out from the last axis on: along columns, and none is left for ranks.
        rank, column = tl.arange(0, AT_ONCE * 8), tl.arange(0, 512)
        tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
        within = (column // 64 * 512 + column % 64) + (rank % 8 * 64)[:, None, None]
        column += tile * 512
        y += token.to(tl.int64) * WIDTH + begin
        h += (token * MODULES + module) * RANKS
        base = tl.load(y + column, mask=column < columns, other=0.0)
        total = tl.zeros([TILES, 512], tl.float32)
        for start in range(0, slabs, AT_ONCE):
            slab = (start + rank // 8)[:, None, None]
            there = (slab < slabs) & (tile * 512 < columns)[None]
            at = _tile(
                first_b + slab * slab_tiles + tile[None], first, page0, page1, page2, pages, layer,
                there, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
            )  # fmt: skip
            b = tl.load(pool + at.to(tl.int64) * 4096 + within, mask=there, other=0.0)
            tl.debug_barrier()  # as above: all reads of B before those of h
            ranks = start * 8 + rank
            mine = tl.load(h + ranks, mask=ranks < tl.minimum(slabs * 8, RANKS), other=0.0)
            total += tl.sum(b.to(tl.float32) * mine[:, None, None], 0)
        added = base.to(tl.float32) + scale * total
        tl.store(y + column, added.to(base.dtype), mask=column < columns)


@jit
def _shrink_block(
    x,
    pool,
    layer,
    lines,
    pages,
    h,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    ADAPTER_PAGES: tl.constexpr,
    LINES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    AT_HAND: tl.constexpr,
    INPUTS: tl.constexpr,
    SLAB_TILES: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Some ranks, of all modules side by side, times a block of tokens' x."""
    layer = tl.load(layer)
    PADDED: tl.constexpr = (RANKS + 7) // 8 * 8
    numbers = tl.program_id(2) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    rank, module = numbers % PADDED, tl.minimum(numbers // PADDED, MODULES - 1)
    # The tokens are the same for all modules; the rest differs, and is a number for each rank.
    _, token, size, _, _, _, _, _, _ = _read_line(
        lines, pages, layer, FIRST_MODULE, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES, ALL_MODULES
    )
    _, _, _, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    there = (numbers < MODULES * PADDED) & (rank < slabs * 8)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    if (tl.program_id(1) * TOKENS < size) & (tl.max(there.to(tl.int32), 0) > 0):
        column, mine = tl.arange(0, STEP), row < size
        within = column // 64 * 512 + column % 64
        source = x + (token + row).to(tl.int64)[:, None] * INPUTS
        total = tl.zeros([TOKENS, RANK_BLOCK], tl.float32)
        for start in range(0, INPUTS, STEP):
            at = _tile(
                first + rank // 8 * SLAB_TILES + start // 512, first, page0, page1, page2, pages,
                layer, there, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
            )  # fmt: skip
            of_rank = at.to(tl.int64) * 4096 + (start % 512 * 8 + rank % 8 * 64)
            a = tl.load(pool + of_rank[:, None] + within[None, :], mask=there[:, None], other=0.0)
            inside = start + column < INPUTS
            own = tl.load(
                source + start + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(own, tl.trans(a), total)
        target = h + ((token + row)[:, None] * MODULES + module[None, :]) * RANKS + rank[None, :]
        tl.store(target, total, mask=mine[:, None] & (there & (rank < RANKS))[None, :])


@jit
def _expand_block(
    y,
    h,
    pool,
    layer,
    lines,
    scales,
    pages,
    places,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    ADAPTER_PAGES: tl.constexpr,
    LINES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MODULES: tl.constexpr,
    AT_HAND: tl.constexpr,
    A_TILES: tl.constexpr,
    COPY: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Some columns of B times a block of tokens' h."""
    layer = tl.load(layer)
    module = tl.program_id(2)
    work, token, size, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    scale = tl.load(scales + work)
    place = places + module * 3
    columns, begin = (
        tl.multiple_of(tl.load(place), ALIGN),
        tl.multiple_of(tl.load(place + 1), ALIGN),
    )
    slab_tiles = tl.load(place + 2)
    first_b = first + tl.cdiv(slabs * A_TILES, COPY) * COPY
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if (size > 0) & (slabs > 0) & (tl.program_id(1) * COLUMNS < columns):
        row = tl.arange(0, TOKENS)
        here = row < size
        target = y + (token + row).to(tl.int64)[:, None] * WIDTH + begin + column[None, :]
        wanted = here[:, None] & (column < columns)[None, :]
        base = tl.load(target, mask=wanted, other=0.0)  # early: all that is read comes at once
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(0, slabs * 8, RANK_BLOCK):
            rank = start + tl.arange(0, RANK_BLOCK)
            there = rank < slabs * 8
            at = _tile(
                first_b + rank // 8 * slab_tiles + tl.program_id(1) * COLUMNS // 512, first,
                page0, page1, page2, pages, layer, there, LAYERLESS, LAYERS, PAGES, PAGE_TILES,
                AT_HAND,
            )  # fmt: skip
            own = (at.to(tl.int64) * 4096 + rank % 8 * 64)[:, None]
            b = tl.load(
                pool + own + (column // 64 % 8 * 512 + column % 64)[None, :],
                mask=there[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            mine = tl.load(
                h + ((token + row)[:, None] * MODULES + module) * RANKS + rank[None, :],
                mask=here[:, None] & (there & (rank < RANKS))[None, :],
                other=0.0,
            )
            # h has more digits than the tensor cores take: two numbers, high and low.
            high = mine.to(b.dtype)
            total = tl.dot(high, b, total)
            total = tl.dot((mine - high.to(tl.float32)).to(b.dtype), b, total)
        added = base.to(tl.float32) + scale * total
        tl.store(target, added.to(base.dtype), mask=wanted)
