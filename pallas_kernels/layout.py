# SPDX-License-Identifier: Apache-2.0
"""How KV cache and adapters lie in the page pool: the geometry that kernels and packing share.

The pool is one array `[L, P, page_elems]`. A page holds, of one layer, either keys and values of
`page_size` tokens, `[2, K, S, D]`, or a run of 8 KiB (in bfloat16) *tiles* of one adapter.

A LoRA matrix is stored as *slabs* of 8 ranks, each a run of `[64, 64]` tiles: row `8 * j + i` of
tile t holds rank i, columns `512 * t + 64 * j ... + 63`. Ranks are padded to a multiple of 8, not
to the largest of a batch; all slabs of a matrix are the same amount of work; a tile is a TMA box.

Axis names, used in every shape of this project:
    T tokens of a step      B requests (rows) of a step   G segments: runs of tokens on one adapter
    E embed                 F ffn                         V vocab
    H query heads           K key/value heads             D head_dim
    L layers                M LoRA modules                N pages of one request or adapter
    A adapter slots         R rank                        I, O a projection's inputs and outputs
    P pages of the pool     S tokens of a page (page_size)
"""

from dataclasses import dataclass
from typing import Any

TILE = 64  # rows and columns of a tile: the 128-byte swizzle of TMA and wgmma is 64 bfloat16 wide
TILE_ELEMS = TILE * TILE
SLAB_RANKS = 8  # the smallest wgmma N, and the finest grain that keeps a tile's rows contiguous
TILE_COLUMNS = TILE_ELEMS // SLAB_RANKS  # columns of a LoRA matrix that one tile covers: 512
COPY_TILES = 4  # tiles of one TMA copy: a box has at most 256 rows


def ceil_div(a: Any, b: int) -> Any:
    """`a / b` rounded up, of integers or integer arrays."""
    return -(-a // b)


def round_up(a: Any, b: int) -> Any:
    """`a` rounded up to a multiple of `b`, of integers or integer arrays."""
    return ceil_div(a, b) * b


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The shape of one page on one device.

    Attributes:
        kv_heads: K, key/value heads that the device holds.
        head_dim: D.
        page_size: S, tokens of a KV page.
    """

    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def kv_elems(self) -> int:
        """Elements that keys and values of a full page take."""
        return 2 * self.kv_heads * self.page_size * self.head_dim

    @property
    def page_elems(self) -> int:
        """Elements of a page: `kv_elems`, padded to whole tiles (true models need no padding)."""
        return round_up(self.kv_elems, TILE_ELEMS)

    @property
    def tiles_per_page(self) -> int:
        return self.page_elems // TILE_ELEMS

    @property
    def copy_tiles(self) -> int:
        """Tiles that one copy moves: a power of two, up to `COPY_TILES`, that divides a page.

        Everything below starts at multiples of it, so that no copy straddles two pages.
        """
        return next(n for n in (COPY_TILES, 2, 1) if self.tiles_per_page % n == 0)

    def slab_tiles(self, columns: int) -> int:
        """Tiles from one slab of a matrix to the next; none of one without columns."""
        tiles = ceil_div(columns, TILE_COLUMNS)
        if 0 < tiles < self.copy_tiles:
            return _power_of_two(tiles)
        return round_up(tiles, self.copy_tiles)

    def section_tiles(self, rank, columns: int):
        """Tiles of a whole matrix of `rank` rows; `rank` may be an integer array."""
        return round_up(ceil_div(rank, SLAB_RANKS) * self.slab_tiles(columns), self.copy_tiles)

    def b_first_tile(self, first_tile, rank, inputs: int):
        """First tile of B, which follows A; integers or integer arrays."""
        return first_tile + self.section_tiles(rank, inputs)

    def module_tiles(self, rank: int, inputs: int, outputs: int) -> int:
        """Tiles of the A `[rank, inputs]` and B `[outputs, rank]` of one module."""
        return self.section_tiles(rank, inputs) + self.section_tiles(rank, outputs)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
