# SPDX-License-Identifier: Apache-2.0
"""A pool full of NaN, into which a test puts what it means to be read: the rest stays NaN."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import TILE_ELEMS, PageLayout
from pallas_kernels.segments import Modules, with_work
from pallas_kernels.slabs import pack_matrix

LAYOUTS = {
    "llama": PageLayout(kv_heads=2, head_dim=64, page_size=16),  # one tile a page
    "padded": PageLayout(kv_heads=1, head_dim=24, page_size=16),  # KV fills part of a page
    "wide": PageLayout(kv_heads=8, head_dim=64, page_size=16),  # four tiles a page
}


def rounded(x) -> np.ndarray:
    """float32 that bfloat16 can hold, so that every implementation is given the same numbers."""
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


TOLERANCE = {  # relative
    jnp.dtype(jnp.float32): 2e-6,
    jnp.dtype(jnp.float16): 5e-4,
    jnp.dtype(jnp.bfloat16): 4e-3,
}


def assert_close(got, want: np.ndarray) -> None:
    """As close to float64's result as the dtype allows; what ought to be 0 is, exactly."""
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= TOLERANCE[got.dtype] * np.linalg.norm(want)  # NaN is not
    np.testing.assert_array_equal(got[want == 0], 0)


class Pages:
    """A NaN-filled pool and its free pages in random order."""

    def __init__(self, layout: PageLayout, layers: int = 3, pages: int = 400, seed: int = 0):
        self.layout, self.layers, self.num_pages = layout, layers, pages
        self.rng = np.random.default_rng(seed)
        self.pool = np.full((layers, pages, layout.page_elems), np.nan, np.float32)
        self.pool[:, 0] = 0
        self._free = list(self.rng.permutation(np.arange(1, pages)))

    def take(self, count: int) -> list[int]:
        return [int(self._free.pop()) for _ in range(count)]

    def write_kv(self, layer: int, page: int, row: int, k: np.ndarray, v: np.ndarray) -> None:
        """k, v: [K, D] of one token."""
        shape = (2, self.layout.kv_heads, self.layout.page_size, self.layout.head_dim)
        view = self.pool[layer, page, : self.layout.kv_elems].reshape(shape)
        view[0, :, row], view[1, :, row] = k, v

    def write_tiles(
        self, layer: int | None, pages: list[int], tiles: np.ndarray, first: int
    ) -> None:
        """Tile t of an adapter, into one layer's slots of its pages or, with None, all layers'."""
        per_slot = self.layout.tiles_per_page
        view = self.pool.reshape(self.layers, self.num_pages, per_slot, TILE_ELEMS)
        for t, tile in enumerate(tiles, first):
            slot, place = divmod(t, per_slot)
            at, page = (
                (layer, slot) if layer is not None else (slot % self.layers, slot // self.layers)
            )
            view[at, pages[page], place] = tile


FIRST_MODULE = 1  # the modules' place in a line of the tables; other places hold nonsense


class RandomAdapters:
    """Random adapters for M modules that share their inputs, written into pages.

    Args:
        ranks: `[G, M]`; 0 for a module that isn't adapted.
        lengths: tokens of each segment.
        inputs: 0 for modules that have B alone.
        outputs: all 0 for modules that have A alone.
        layer: that has them; None for modules that belong to no layer.
        tokens: most tokens of the step, base model's included.
        pages_each: of an adapter.
    """

    def __init__(
        self,
        pages: Pages,
        ranks,
        lengths,
        inputs: int,
        outputs: tuple[int, ...],
        layer: int | None,
        tokens: int,
        pages_each: int = 24,
        block: int = 8,
        few: int = 0,
    ):
        layout, rng = pages.layout, pages.rng
        self.modules = Modules(FIRST_MODULE, inputs, outputs)
        self.ranks = np.asarray(ranks)
        self.scale = rng.uniform(0.5, 2.0, self.ranks.shape).astype(np.float32)
        first_tile = np.zeros(self.ranks.shape, np.int32)
        self.a, self.b = {}, {}
        lists = []
        for g, line in enumerate(self.ranks):
            mine: list[int] = pages.take(pages_each)
            first = 0
            for m, rank in enumerate(line):
                if rank == 0:
                    continue
                self.a[g, m] = rounded(rng.standard_normal((rank, inputs)) / inputs**0.5)
                self.b[g, m] = rounded(rng.standard_normal((outputs[m], rank)))
                first_tile[g, m] = first
                for matrix in (self.a[g, m], self.b[g, m].T):
                    if matrix.size == 0:
                        continue
                    tiles = pack_matrix(matrix, layout)
                    pages.write_tiles(layer, mine, tiles, first)
                    first += len(tiles)
            lists.append(mine)
        line, places = -1 if layer is None else layer, self.modules.places
        wide = (len(lengths), pages.layers + 1, FIRST_MODULE + len(outputs) + 1)
        tables = [np.full(wide, 3, x.dtype) for x in (self.ranks, first_tile, self.scale)]
        for table, values in zip(tables, (self.ranks, first_tile, self.scale), strict=True):
            table[:, line, places] = values
        ints = (jnp.asarray(x, jnp.int32) for x in (lengths, lists, *tables[:2]))
        size = {"layout": layout, "tokens": tokens, "block": block, "few": few}
        self.adapters = with_work(*ints, jnp.asarray(tables[2]), **size)
        self.owner = np.repeat(np.arange(len(lengths)), lengths)  # segment of each token

    def shrink(self, x: np.ndarray, max_rank: int) -> np.ndarray:
        """h of every token, in float64."""
        h = np.zeros((len(x), self.ranks.shape[1], max_rank))
        for t, g in enumerate(self.owner):
            for m, rank in enumerate(self.ranks[g]):
                if rank:
                    h[t, m, :rank] = self.a[g, m].astype(np.float64) @ x[t]
        return h

    def expand(self, y: np.ndarray, h: np.ndarray, outputs: tuple[int, ...]) -> np.ndarray:
        """y + s h Bᵀ of every token, in float64."""
        out, starts = y.astype(np.float64), np.cumsum([0, *outputs])
        for t, g in enumerate(self.owner):
            for m, rank in enumerate(self.ranks[g]):
                if rank:
                    delta = self.b[g, m].astype(np.float64) @ h[t, m, :rank]
                    out[t, starts[m] : starts[m + 1]] += self.scale[g, m] * delta
        return out
