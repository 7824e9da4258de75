# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of LoRA: each line of a step's list of work, for single tokens and for blocks.

Single tokens have a slab times a vector, a sum of products that waits for memory only. A tile's
columns are dealt out to threads 16 bytes at a time, and each thread has all 8 ranks of its columns:
what it adds up over ranks stays in its registers, and as many reads as ranks are under way at once.
Blocks of tokens have matrix products, whose operands are gathered from the tiles' rows. Between the
halves h is float32, in the order of the tokens.
"""

import triton.language as tl

from pallas_kernels.triton import jit


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
def _read_b(
    scales,
    places,
    work,
    module,
    first,
    slabs,
    A_TILES: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What expanding a line of work needs beside the line.

    Returns:
        The module's scale, its columns, where they begin in y, the tiles of a slab of its B, and
        the first one of B, which follows A.
    """
    scale, place = tl.load(scales + work), places + module * 3
    # What numbers of columns are multiples of, for wide loads.
    columns = tl.multiple_of(tl.load(place), ALIGN)
    begin = tl.multiple_of(tl.load(place + 1), ALIGN)
    first_b = first + tl.cdiv(slabs * A_TILES, COPY) * COPY
    return scale, columns, begin, tl.load(place + 2), first_b


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
def _sum_of_parts(h, mask, RANKS: tl.constexpr, PARTS: tl.constexpr):
    """h at some pointers of its first part; each part is the sum over some of x's columns."""
    total = tl.load(h, mask=mask, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(h + part * RANKS, mask=mask, other=0.0)
    return total


@jit
def _shrink_slabs(
    x,
    pool,
    layer,
    part,
    slab,
    slabs,
    first,
    pages,
    page0,
    page1,
    page2,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    AT_HAND: tl.constexpr,
    INPUTS: tl.constexpr,
    SLAB_TILES: tl.constexpr,
    PARTS: tl.constexpr,
    SLABS_AT_ONCE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Some slabs of A, from `slab` on, times a part of a token's x: a sum for each rank."""
    TILES: tl.constexpr = (INPUTS + 511) // 512
    PART_TILES: tl.constexpr = (TILES + PARTS - 1) // PARTS
    # Threads are dealt out along the last axis first: it has the columns of all tiles, so that none
    # is left for ranks. Which of two others would be next Triton's versions disagree on.
    rank, column = tl.arange(0, SLABS_AT_ONCE * 8)[:, None], tl.arange(0, AT_ONCE * 512)
    number = column // 512 if AT_ONCE > 1 else 0
    within = column // 64 % 8 * 512 + column % 64 + rank % 8 * 64
    slab += rank // 8
    total = tl.zeros([SLABS_AT_ONCE * 8, AT_ONCE * 64], tl.float32)
    for start in range(0, PART_TILES, AT_ONCE):
        tile = start + number
        inside = tile < PART_TILES
        tile += part * PART_TILES
        inside &= tile < TILES
        there = (slab < slabs) & inside
        at = _tile(
            first + slab * SLAB_TILES + tile, first, page0, page1, page2, pages, layer, there,
            LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
        )  # fmt: skip
        a = tl.load(pool + at.to(tl.int64) * 4096 + within, mask=there, other=0.0)
        # All reads of A are under way before x, which every sum needs, is read: the compiler
        # would start to add, and wait, in between.
        tl.debug_barrier()
        source = (start + part * PART_TILES) * 512 + column
        mine = tl.load(x + source, mask=inside & (source < INPUTS), other=0.0)
        products = a.to(tl.float32) * mine.to(tl.float32)
        total += tl.sum(tl.reshape(products, [SLABS_AT_ONCE * 8, AT_ONCE * 64, 8]), 2)
    return tl.sum(total, 1)


@jit
def _expand_tiles(
    y,
    h,
    pool,
    layer,
    tile,
    slabs,
    scale,
    columns,
    slab_tiles,
    first_b,
    first,
    pages,
    page0,
    page1,
    page2,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    AT_HAND: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """To a token's y, in the columns of some tiles, all slabs of B times its h."""
    rank, column = tl.arange(0, AT_ONCE * 8), tl.arange(0, TILES * 512)
    within = column // 64 % 8 * 512 + column % 64 + (rank % 8 * 64)[:, None]
    of_y = tile * 512 + column
    target, wanted = y + of_y, of_y < columns
    tile += column // 512 if TILES > 1 else 0
    base = tl.load(target, mask=wanted, other=0.0)
    total = tl.zeros([TILES * 512], tl.float32)
    for start in range(0, slabs, AT_ONCE):
        slab = (start + rank // 8)[:, None]
        there = (slab < slabs) & (tile * 512 < columns)
        at = _tile(
            first_b + slab * slab_tiles + tile, first, page0, page1, page2, pages, layer, there,
            LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
        )  # fmt: skip
        b = tl.load(pool + at.to(tl.int64) * 4096 + within, mask=there, other=0.0)
        tl.debug_barrier()  # as above: all reads of B before those of h
        ranks = start * 8 + rank
        mine = _sum_of_parts(h + ranks, ranks < tl.minimum(slabs * 8, RANKS), RANKS, PARTS)
        total += tl.sum(b.to(tl.float32) * mine[:, None], 0)
    added = base.to(tl.float32) + scale * total
    tl.store(target, added.to(base.dtype), mask=wanted)


@jit
def shrink_single(
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
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A slab of A times a part of a token's x."""
    layer = tl.load(layer)
    module, slab = tl.program_id(1) // SLABS, tl.program_id(1) % SLABS
    part = tl.program_id(2) if PARTS > 1 else 0  # known: less to compute
    _, token, size, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    if (size > 0) & (slab < slabs):
        total = _shrink_slabs(
            x + token * INPUTS, pool, layer, part, slab, slabs, first, pages, page0, page1,
            page2, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND, INPUTS, SLAB_TILES, PARTS, 1,
            AT_ONCE,
        )  # fmt: skip
        ranks = slab * 8 + tl.arange(0, 8)
        h += ((token * MODULES + module) * PARTS + part) * RANKS
        tl.store(h + ranks, total, mask=ranks < RANKS)


@jit
def expand_single(
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
    PARTS: tl.constexpr,
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
    scale, columns, begin, slab_tiles, first_b = _read_b(
        scales, places, work, module, first, slabs, A_TILES, COPY, ALIGN
    )
    tile = tl.program_id(1) * TILES
    if (size > 0) & (slabs > 0) & (tile * 512 < columns):
        _expand_tiles(
            y + (token.to(tl.int64) * WIDTH + begin),
            h + (token * MODULES + module) * (PARTS * RANKS), pool, layer, tile, slabs, scale,
            columns, slab_tiles, first_b, first, pages, page0, page1, page2, LAYERLESS, LAYERS,
            PAGES, PAGE_TILES, AT_HAND, RANKS, PARTS, TILES, AT_ONCE,
        )  # fmt: skip


@jit
def delta_single(
    y,
    x,
    pool,
    layer,
    lines,
    scales,
    pages,
    places,
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
    A_TILES: tl.constexpr,
    COPY: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SLABS_AT_ONCE: tl.constexpr,
):
    """All of a module of a token."""
    layer = tl.load(layer)
    module = tl.program_id(1)
    work, token, size, slabs, first, pages, page0, page1, page2 = _read_line(
        lines, pages, layer, FIRST_MODULE + module, LAYERLESS, LAYERS, ADAPTER_PAGES, LINES,
        ALL_MODULES,
    )  # fmt: skip
    scale, columns, begin, slab_tiles, first_b = _read_b(
        scales, places, work, module, first, slabs, A_TILES, COPY, ALIGN
    )
    if (size > 0) & (slabs > 0):
        own = h + (token * MODULES + module) * RANKS
        for slab in range(0, slabs, SLABS_AT_ONCE):
            total = _shrink_slabs(
                x + token * INPUTS, pool, layer, 0, slab, slabs, first, pages, page0, page1,
                page2, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND, INPUTS, A_TILES, 1,
                SLABS_AT_ONCE, AT_ONCE,
            )  # fmt: skip
            ranks = slab * 8 + tl.arange(0, SLABS_AT_ONCE * 8)
            tl.store(own + ranks, total, mask=ranks < RANKS)
        tl.debug_barrier()  # what one thread has written all may read
        for tile in range(0, tl.cdiv(columns, 512), AT_ONCE):
            _expand_tiles(
                y + (token.to(tl.int64) * WIDTH + begin), own, pool, layer, tile, slabs, scale,
                columns, slab_tiles, first_b, first, pages, page0, page1, page2, LAYERLESS,
                LAYERS, PAGES, PAGE_TILES, AT_HAND, RANKS, 1, AT_ONCE, SLABS_AT_ONCE,
            )  # fmt: skip


@jit
def shrink_block(
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
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Some ranks, of all modules side by side, times a part of a block of tokens' x."""
    PART_INPUTS: tl.constexpr = (INPUTS + PARTS * STEP - 1) // (PARTS * STEP) * STEP
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
    part, begin = tl.program_id(1) % PARTS, tl.program_id(1) // PARTS * TOKENS
    row = begin + tl.arange(0, TOKENS)
    if (begin < size) & (tl.max(there.to(tl.int32), 0) > 0):
        column, mine = tl.arange(0, STEP), row < size
        within = column // 64 * 512 + column % 64
        source = x + (token + row).to(tl.int64)[:, None] * INPUTS
        total = tl.zeros([TOKENS, RANK_BLOCK], tl.float32)
        for step in range(0, PART_INPUTS, STEP):
            start = part * PART_INPUTS + step
            # The last part may go on past the slab, where anything may lie, NaN as well.
            known = there & (start < INPUTS) if PARTS > 1 else there
            at = _tile(
                first + rank // 8 * SLAB_TILES + start // 512, first, page0, page1, page2, pages,
                layer, known, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
            )  # fmt: skip
            of_rank = at.to(tl.int64) * 4096 + (start % 512 * 8 + rank % 8 * 64)
            a = tl.load(pool + of_rank[:, None] + within[None, :], mask=known[:, None], other=0.0)
            inside = start + column < INPUTS
            own = tl.load(
                source + start + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(own, tl.trans(a), total)
        place = ((token + row)[:, None] * MODULES + module[None, :]) * PARTS + part
        target = h + place * RANKS + rank[None, :]
        tl.store(target, total, mask=mine[:, None] & (there & (rank < RANKS))[None, :])


@jit
def expand_block(
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
    PARTS: tl.constexpr,
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
    scale, columns, begin, slab_tiles, first_b = _read_b(
        scales, places, work, module, first, slabs, A_TILES, COPY, ALIGN
    )
    start = tl.program_id(1) * COLUMNS
    if (size > 0) & (slabs > 0) & (start < columns):
        row, column = tl.arange(0, TOKENS), start + tl.arange(0, COLUMNS)
        here, rank = row < size, tl.arange(0, RANK_BLOCK)
        of_h = h + (token * MODULES + module) * (PARTS * RANKS)
        of_h += row[:, None] * (MODULES * PARTS * RANKS) + rank
        ranks = tl.minimum(slabs * 8, RANKS)
        if RANKS <= RANK_BLOCK:  # all of h at once, early, with all else
            mine = _sum_of_parts(of_h, here[:, None] & (rank < ranks), RANKS, PARTS)
        # From the block's first token on, 32 bits are enough.
        target = y + (token.to(tl.int64) * WIDTH + begin) + (row[:, None] * WIDTH + column)
        wanted = here[:, None] & (column < columns)
        base = tl.load(target, mask=wanted, other=0.0)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for more in range(0, RANKS if RANKS <= RANK_BLOCK else slabs * 8, RANK_BLOCK):
            b = _ranks_of_b(
                pool, layer, more + rank, column, start // 512, columns, slabs, slab_tiles, first_b,
                first, pages, page0, page1, page2, LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
            )  # fmt: skip
            if RANKS > RANK_BLOCK:
                known = here[:, None] & (more + rank < ranks)
                mine = _sum_of_parts(of_h + more, known, RANKS, PARTS)
            total = _plus_product(total, mine, b)
        added = base.to(tl.float32) + scale * total
        tl.store(target, added.to(base.dtype), mask=wanted)


@jit
def _ranks_of_b(
    pool,
    layer,
    rank,
    column,
    tile,
    columns,
    slabs,
    slab_tiles,
    first_b,
    first,
    pages,
    page0,
    page1,
    page2,
    LAYERLESS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    AT_HAND: tl.constexpr,
):
    """Of B some ranks' columns, which lie in one tile of each slab."""
    there = rank < slabs * 8
    at = _tile(
        first_b + rank // 8 * slab_tiles + tile, first, page0, page1, page2, pages, layer, there,
        LAYERLESS, LAYERS, PAGES, PAGE_TILES, AT_HAND,
    )  # fmt: skip
    own = (at.to(tl.int64) * 4096 + rank % 8 * 64)[:, None]
    within = column // 64 % 8 * 512 + column % 64
    return tl.load(pool + own + within, mask=there[:, None] & (column < columns), other=0.0)


@jit
def _plus_product(total, h, b):
    """h has more digits than the tensor cores take: two numbers, high and low."""
    high = h.to(b.dtype)
    total = tl.dot(high, b, total)
    return tl.dot((h - high.to(tl.float32)).to(b.dtype), b, total)
