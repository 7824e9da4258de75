# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernels of LoRA are launched, and their constants."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import SLAB_RANKS, TILE_COLUMNS, PageLayout, ceil_div, round_up
from pallas_kernels.lora_triton_kernels import (
    delta_single,
    expand_block,
    expand_single,
    shrink_block,
    shrink_single,
)
from pallas_kernels.segments import PAGES_AT_HAND, Modules, Work
from pallas_kernels.triton import launch, power_of_two, scalar, stages

LEAST_RANKS = 16  # of an operand of `tl.dot`, so two slabs


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels split their work.

    Attributes:
        shrink_parts: programs that share the columns of a token's x, each with a sum of its own.
        shrink_tiles: of A, that a program for a single token asks for at once.
        expand_tiles: of each slab of B, whose columns a program for a single token has.
        expand_slabs: whose tiles it asks for at once.
        shrink_warps, expand_warps: of such programs. Two of them cover a tile's columns, 16 bytes
            each thread.
        whole_ranks: up to so many a single token's module is one program, both halves: one launch
            instead of two. 0: never.
        whole_columns: of x, or of a module, that are not too many for one program.
        whole_programs: of which there must be so many: fewer would leave a card idle.
        whole_tiles, whole_slabs: that such a program asks for at once, two warps a tile.
        block_programs: wanted to shrink a step's blocks of tokens; to get so many, some share the
            columns of a block's x.
        block_parts: most that share them.
        block_tokens: of a program that shrinks a block of tokens, or a part of one.
        block_inputs: columns of x in a step of it.
        block_shrink_ranks: most ranks, of all modules, of its matrix product.
        block_shrink_warps, stages: of such a program, and of its loop's pipeline.
        block_outputs: columns of y of a program that expands a block of tokens.
        block_expand_ranks, block_expand_warps: as above.
    """

    shrink_parts: int = 4
    shrink_tiles: int = 1
    shrink_warps: int = 2
    expand_tiles: int = 1
    expand_slabs: int = 1
    expand_warps: int = 2
    whole_ranks: int = 16
    whole_columns: int = 4096
    whole_programs: int = 192
    whole_tiles: int = 4
    whole_slabs: int = 1
    block_programs: int = 128
    block_parts: int = 4
    block_tokens: int = 64
    block_inputs: int = 128
    block_shrink_ranks: int = 64
    block_shrink_warps: int = 4
    stages: int = 4
    block_outputs: int = 128
    block_expand_ranks: int = 64
    block_expand_warps: int = 4


TUNING = {
    # Not measured: as on an H200, but that registers of 64 ranks' products would spill.
    80: Tuning(block_expand_ranks=32),
    # `benchmarks.tune_lora` on an H200; us on the device, of q, k and v at hidden 4096 if no other
    # is named. 64 tokens on 64 adapters of rank 16: both halves in one 16.5 (2 tiles of 2 slabs at
    # once 16.8), apart 17.5, of 1 part 18.9; o's 10.1 in one and 9.3 apart, down's of 11008 inputs
    # 25.5 and 13.7. 4096 tokens on 8 adapters of rank 16: 77.7 in 2 parts, 79.5 in 1, 87.7 in 4,
    # which expand adds up again for every column block; 512 tokens on one: 18.4 in 4, 28.5 in 1. Of
    # rank 64, 128.4; with 32 of them at once in expand 179.6.
    90: Tuning(),
}


def delta(x, y, pool, layer, work: Work, pages, *, modules: Modules, max_rank, layout, tuning):
    """`y + s · (x Aᵀ) Bᵀ` of the tokens of a list of work; y of the others stays as it is."""
    widest = max(modules.inputs, *modules.outputs)
    programs = work.lines.shape[2] * modules.count
    small = max_rank <= tuning.whole_ranks and widest <= tuning.whole_columns
    if work.block > 1 or not small or programs < tuning.whole_programs:
        where, static = (pool, layer, work, pages), {"modules": modules, "layout": layout}
        h = shrink(x, *where, max_rank=max_rank, tuning=tuning, **static)
        return expand(y, h, *where, tuning=tuning, **static)
    static = _expand_static(y, max_rank, pool, layer, work, pages, modules, layout)
    tiles = min(tuning.whole_tiles, power_of_two(ceil_div(widest, TILE_COLUMNS)))
    options: dict[str, Any] = {
        "num_warps": 2 * tiles,
        "INPUTS": modules.inputs,
        "AT_ONCE": tiles,
        "SLABS_AT_ONCE": min(tuning.whole_slabs, power_of_two(ceil_div(max_rank, SLAB_RANKS))),
    }
    arrays = x, pool, _layer(layer), work.lines, work.scale, pages, _places(modules, layout)
    h = jax.ShapeDtypeStruct((x.shape[0], modules.count, max_rank), jnp.float32)
    grid = (work.lines.shape[2], modules.count)
    y, _ = launch(delta_single, *arrays, updated=y, out_type=[h], grid=grid, **options, **static)
    return y


def shrink(x, pool, layer, work: Work, pages, *, modules: Modules, max_rank, layout, tuning):
    """`h = x Aᵀ` of the tokens of a list of work.

    Returns:
        `[T, M, parts, R]`, float32, to be summed over parts, which are of the columns of x. What
        lies past a module's slabs, and other tokens' h, may be anything.
    """
    static = _static(pool, layer, work, pages, modules, layout)
    static |= {"INPUTS": modules.inputs, "SLAB_TILES": layout.slab_tiles(modules.inputs)}
    static |= {"AT_HAND": _at_hand(max_rank, modules.inputs, 0, layer, layout), "RANKS": max_rank}
    arrays = x, pool, _layer(layer), work.lines, pages
    lines = work.lines.shape[2]
    if work.block == 1:
        slabs, tiles = ceil_div(max_rank, SLAB_RANKS), ceil_div(modules.inputs, TILE_COLUMNS)
        kernel, parts = shrink_single, tuning.shrink_parts
        options: dict[str, Any] = {"num_warps": tuning.shrink_warps, "SLABS": slabs}
        options |= {"AT_ONCE": min(tuning.shrink_tiles, power_of_two(ceil_div(tiles, parts)))}
        grid = (lines, modules.count * slabs, parts)
    else:
        # The ranks of all modules side by side: x is read once for all of them.
        all_ranks = modules.count * round_up(max_rank, SLAB_RANKS)
        ranks = _block_ranks(all_ranks, tuning.block_shrink_ranks)
        size = min(tuning.block_tokens, work.block)
        blocks, rank_blocks = ceil_div(work.block, size), ceil_div(all_ranks, ranks)
        # As many lines as full blocks: there may be more, for more segments, but most are empty.
        programs = ceil_div(x.shape[0], work.block) * blocks * rank_blocks
        wanted = power_of_two(ceil_div(tuning.block_programs, programs))
        kernel, parts = shrink_block, min(wanted, tuning.block_parts)
        if max_rank > tuning.block_expand_ranks:
            parts = min(parts, 2)  # expand reads h in turns: of four parts, registers would spill
        step = 2 * tuning.block_inputs * (size + ranks)  # bytes: what it reads of x and A
        options = {"num_warps": tuning.block_shrink_warps}
        options |= {"num_stages": stages(tuning.stages, step=step)}
        options |= {"TOKENS": size, "STEP": tuning.block_inputs, "RANK_BLOCK": ranks}
        grid = (lines, parts * blocks, rank_blocks)
    h = jax.ShapeDtypeStruct((x.shape[0], modules.count, parts, max_rank), jnp.float32)
    return launch(kernel, *arrays, out_type=[h], grid=grid, PARTS=parts, **options, **static)


def expand(y, h, pool, layer, work: Work, pages, *, modules: Modules, layout, tuning):
    """`y + s · h Bᵀ` of the tokens of a list of work; y of the others stays as it is.

    Args:
        h: `[T, M, parts, R]`, float32.
    """
    parts, max_rank = h.shape[2:]
    widest = max(modules.outputs)
    static = _expand_static(y, max_rank, pool, layer, work, pages, modules, layout)
    static |= {"PARTS": parts}
    arrays = h, pool, _layer(layer), work.lines, work.scale, pages, _places(modules, layout)
    lines = work.lines.shape[2]
    if work.block == 1:
        columns = tuning.expand_tiles * TILE_COLUMNS
        slabs = min(tuning.expand_slabs, power_of_two(ceil_div(max_rank, SLAB_RANKS)))
        options: dict[str, Any] = {"num_warps": tuning.expand_warps}
        options |= {"TILES": tuning.expand_tiles, "AT_ONCE": slabs}
        grid = (lines, ceil_div(widest, columns), modules.count)
        return launch(expand_single, *arrays, updated=y, grid=grid, **options, **static)
    columns, ranks = tuning.block_outputs, _block_ranks(max_rank, tuning.block_expand_ranks)
    options: dict[str, Any] = {
        "num_warps": tuning.block_expand_warps,
        "num_stages": 1,
        "TOKENS": work.block,
        "COLUMNS": columns,
        "RANK_BLOCK": ranks,
    }
    grid = (lines, ceil_div(widest, columns), modules.count)
    return launch(expand_block, *arrays, updated=y, grid=grid, **options, **static)


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


def _expand_static(
    y, max_rank, pool, layer, work: Work, pages, modules: Modules, layout: PageLayout
) -> dict[str, Any]:
    return _static(pool, layer, work, pages, modules, layout) | {
        "AT_HAND": _at_hand(max_rank, modules.inputs, max(modules.outputs), layer, layout),
        "A_TILES": layout.slab_tiles(modules.inputs),
        "COPY": layout.copy_tiles,
        "RANKS": max_rank,
        "WIDTH": y.shape[1],
        # What numbers of columns are multiples of, for wide loads: of 16 bytes there is no wider.
        "ALIGN": math.gcd(8, *modules.outputs),
    }


def _places(modules: Modules, layout: PageLayout) -> jax.Array:
    """Of each module: columns, where they begin in y, tiles of a slab of B."""
    begin = np.cumsum((0, *modules.outputs[:-1]))
    slab_tiles = [layout.slab_tiles(columns) for columns in modules.outputs]
    return jnp.asarray(np.stack([modules.outputs, begin, slab_tiles], axis=1), jnp.int32)


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
