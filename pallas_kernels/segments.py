# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step belong to which adapter, and where each adapter's matrices lie."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import SLAB_RANKS, PageLayout, ceil_div

PAGES_AT_HAND = 3  # pages of a module that a line of work holds: the rest of its 32 bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """What one kernel has to do, as a list: see `with_work`.

    A line is at most `block` consecutive tokens of a segment. For each module it says: first token,
    tokens, slabs, first tile of A, segment, and the pages from that tile's on, as many as there is
    room for. Lines without tokens come last.
    """

    lines: Int[Array, "lines M n 8"]  # 32 bytes: one sector of a cache line
    scale: Float[Array, "lines M n"]
    count: Int[Array, " 1"]  # lines that have tokens
    block: int = field(metadata={"static": True})

    def has(self, tokens: int) -> Bool[Array, " T"]:
        """Which of a step's tokens are here."""
        first, size = self.lines[0, 0, :, 0], self.lines[0, 0, :, 1]
        token = jnp.arange(tokens)[:, None]
        return ((token >= first) & (token < first + size)).any(axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapters:
    """The adapters of a step: segment g is a run of consecutive tokens that share one.

    Runs follow each other from token 0 on. Tokens past the last run belong to the base model: they
    have no segment, cost nothing, and get no delta. Padding segments have length 0. The last line
    of the layer axis holds the modules that belong to no layer.
    """

    length: Int[Array, " G"]  # tokens of each run
    pages: Int[Array, "G N"]  # the adapter's pages, padded with the reserved page 0
    rank: Int[Array, "G lines M"]  # 0: not adapted
    first_tile: Int[Array, "G lines M"]  # of A; B follows it, see `PageLayout.b_first_tile`
    scale: Float[Array, "G lines M"]
    work: tuple[Work, ...]  # the same for kernels: every token that has an adapter is in one list


@dataclass(frozen=True, slots=True)
class Modules:
    """Neighbouring LoRA modules that share their input. Static.

    Attributes:
        first: the first one's place among the M modules of a line.
        inputs: I.
        outputs: columns of each, side by side in the projection's output; their sum is O.
    """

    first: int
    inputs: int
    outputs: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.outputs)

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + self.count)


class ModuleTable(NamedTuple):
    """Where the matrices of a few modules of one layer lie in each segment's pages."""

    rank: Int[Array, "G M"]
    first_tile: Int[Array, "G M"]
    scale: Float[Array, "G M"]


def with_work(
    length: Int[Array, " G"],
    pages: Int[Array, "G N"],
    rank: Int[Array, "G lines M"],
    first_tile: Int[Array, "G lines M"],
    scale: Float[Array, "G lines M"],
    *,
    layout: PageLayout,
    tokens: int,
    block: int = 1,
    few: int = 0,
) -> Adapters:
    """The adapters of a step of at most `tokens` tokens.

    The lists of work are made once a step, for all layers. With `block` 1 there is one of single
    tokens, as decode has them. Else there is one of blocks, which are cut at multiples of `block`:
    64 are the rows of a tensor-core operand, for prompts. Where a block would be nearly empty, it
    is better to take each token on its own: runs of at most `few` tokens are in a list of single
    ones, which is the only one if no run can have more.
    """
    segments = length.shape[0]
    tables = pages, rank, first_tile, scale
    if block == 1:
        work = (_work(length, length > 0, *tables, layout, block=1, count=tokens),)
    else:
        runs = min(segments, tokens // (few + 1))
        count = min(tokens, runs + tokens // block)
        work = ()
        if count:  # a kernel has one program at least
            work += (_work(length, length > few, *tables, layout, block=block, count=count),)
        if few:
            single, count = (length > 0) & (length <= few), min(tokens, segments * few)
            work += (_work(length, single, *tables, layout, block=1, count=count),)
    return Adapters(length, *tables, work)


def _work(
    length: Int[Array, " G"],
    chosen: Bool[Array, " G"],
    pages: Int[Array, "G N"],
    rank: Int[Array, "G lines M"],
    first_tile: Int[Array, "G lines M"],
    scale: Float[Array, "G lines M"],
    layout: PageLayout,
    *,
    block: int,
    count: int,
) -> Work:
    """The tokens of some runs, cut at multiples of `block`, in at most `count` lines."""
    segments = length.shape[0]
    end = jnp.cumsum(length)
    start = end - length
    blocks = jnp.where(chosen, ceil_div(end, block) - start // block, 0)
    ends, index = jnp.cumsum(blocks), jnp.arange(count)
    segment = jnp.minimum((index[:, None] >= ends).sum(1), segments - 1)
    window = (start[segment] // block + index - (ends - blocks)[segment]) * block
    first_token = jnp.maximum(start[segment], window)
    size = jnp.minimum(end[segment], window + block) - first_token
    size = jnp.where(index < ends[-1], size, 0)
    # Most work first: the last ones to start should not be the longest.
    order = _sorted_places(jnp.where(size > 0, -rank.sum((1, 2))[segment], 1))
    segment, first_token, size = segment[order], first_token[order], size[order]
    shape = (count, *rank.shape[1:])
    slot = first_tile // layout.tiles_per_page
    # Modules that belong to no layer fill a page in all layers before they go on to the next.
    slot = slot.at[:, -1].set(slot[:, -1] // (rank.shape[1] - 1))
    at_hand = [
        jnp.take_along_axis(pages, (slot + n).reshape(segments, -1), axis=1, mode="clip")
        for n in range(PAGES_AT_HAND)
    ]
    fields = [
        jnp.broadcast_to(first_token[:, None, None], shape),
        jnp.broadcast_to(size[:, None, None], shape),
        ceil_div(rank, SLAB_RANKS)[segment],
        first_tile[segment],
        jnp.broadcast_to(segment[:, None, None], shape),
        *(page.reshape(rank.shape)[segment] for page in at_hand),
    ]
    lines = jnp.stack(fields, axis=-1).astype(jnp.int32).transpose(1, 2, 0, 3)
    scales = scale[segment].transpose(1, 2, 0)
    return Work(lines, scales, ends[-1:].astype(jnp.int32), block)


def _sorted_places(key: Int[Array, " n"]) -> Int[Array, " n"]:
    """A stable argsort of a few numbers, by comparing all of them with all.

    Two launches. XLA's sort takes many short ones, one after another.
    """
    index = jnp.arange(key.shape[0])
    smaller = key < key[:, None]
    before = smaller | ((key == key[:, None]) & (index < index[:, None]))
    place = before.sum(1)
    return jnp.where(place == index[:, None], index, 0).sum(1)


def module_table(adapters: Adapters, layer: Int[Array, ""] | None, modules: Modules) -> ModuleTable:
    """The lines of a layer's modules; with None, of those that belong to no layer."""
    line = -1 if layer is None else layer
    fields = (adapters.rank, adapters.first_tile, adapters.scale)
    return ModuleTable(*(field[:, line, modules.places] for field in fields))
