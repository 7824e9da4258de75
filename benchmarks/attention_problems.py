# SPDX-License-Identifier: Apache-2.0
"""Attention and the writing of keys and values, over random pages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Work, random_array
from benchmarks.problems import ITEM, PAGE_SIZE, Problem, Program, Size, program
from pallas_kernels import paged_decode, paged_prefill, rope_kv_write
from pallas_kernels.backend import Backend
from pallas_kernels.layout import ceil_div

ROWS = 64  # of a prefill: an engine pads to its `max_num_seqs`


def page_table(contexts: Sequence[int]) -> tuple[np.ndarray, int]:
    """Pages of requests, in random order, and how many pages there are."""
    used = [ceil_div(context, PAGE_SIZE) for context in contexts]
    pages = np.random.default_rng(0).permutation(np.arange(1, sum(used) + 1))
    table = np.zeros((len(contexts), max(used)), np.int32)
    for row, own in zip(table, np.split(pages, np.cumsum(used)[:-1]), strict=True):
        row[: len(own)] = own
    return table, sum(used) + 1


@dataclass(frozen=True)
class Decode(Problem):
    op = "paged_decode"
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.heads}, batch {self.batch}, context {self.context}"

    @property
    def work(self) -> Work:
        tokens = self.batch * self.context
        elems = tokens * self.kv_elems + 2 * self.batch * self.query_elems
        return Work(elems * ITEM, 4 * tokens * self.query_elems)

    def program(self, backend: Backend, size: Size) -> Program:
        table, pages = page_table([self.context] * self.batch)
        pool = self.pool(pages, size)
        contexts = jnp.full(self.batch, self.context, jnp.int32)

        def one(q, layer, pool, *where):
            return paged_decode(q, pool, layer, *where, layout=self.layout, backend=backend), None

        arrays = pool, jnp.asarray(table), contexts
        return program(one, self.queries(self.batch), len(pool), *arrays, size=size)

    def tiny(self) -> Self:
        return replace(super().tiny(), batch=2, context=20)


@dataclass(frozen=True)
class Prefill(Problem):
    """`requests` prompts, whole, of `tokens` tokens together."""

    op = "paged_prefill"
    tokens: int
    requests: int = 1

    @property
    def name(self) -> str:
        each = self.tokens // self.requests
        what = f"{each} tokens" if self.requests == 1 else f"{self.requests} x {each} tokens"
        return f"{self.heads}, {what}, causal"

    @property
    def work(self) -> Work:
        each = self.tokens // self.requests
        pairs = self.requests * each * (each + 1) // 2
        elems = self.tokens * (self.kv_elems + 2 * self.query_elems)
        return Work(elems * ITEM, 4 * pairs * self.query_elems)

    def program(self, backend: Backend, size: Size) -> Program:
        each = self.tokens // self.requests
        table, pages = page_table([each] * self.requests)
        table = np.pad(table, ((0, ROWS - self.requests), (0, 0)))
        lengths = np.pad(np.full(self.requests, each, np.int32), (0, ROWS - self.requests))
        starts = np.cumsum(lengths, dtype=np.int32) - lengths
        pool = self.pool(pages, size)

        def one(q, layer, pool, *where):
            return paged_prefill(q, pool, layer, *where, layout=self.layout, backend=backend), None

        arrays = pool, *map(jnp.asarray, (table, starts, lengths, lengths))
        return program(one, self.queries(self.tokens), len(pool), *arrays, size=size)

    def tiny(self) -> Self:
        return replace(super().tiny(), tokens=20 * self.requests)


@dataclass(frozen=True)
class Mixed(Problem):
    """A step of requests that decode, and of a whole prompt, as nearly all are on a busy server."""

    op = "paged_prefill"
    decodes: int
    context: int
    prompt: int

    @property
    def name(self) -> str:
        decodes = f"{self.decodes} decodes, context {self.context}"
        return f"{self.heads}, {decodes}, and a prompt of {self.prompt}"

    @property
    def work(self) -> Work:
        context = self.decodes * self.context
        pairs = context + self.prompt * (self.prompt + 1) // 2
        queries = 2 * (self.decodes + self.prompt) * self.query_elems
        elems = (context + self.prompt) * self.kv_elems + queries
        return Work(elems * ITEM, 4 * pairs * self.query_elems)

    def program(self, backend: Backend, size: Size) -> Program:
        contexts = np.array([self.context] * self.decodes + [self.prompt], np.int32)
        lengths = np.array([1] * self.decodes + [self.prompt], np.int32)
        table, pages = page_table(contexts.tolist())
        starts = np.cumsum(lengths, dtype=np.int32) - lengths
        pool = self.pool(pages, size)

        def one(q, layer, pool, *where):
            return paged_prefill(q, pool, layer, *where, layout=self.layout, backend=backend), None

        arrays = pool, *map(jnp.asarray, (table, starts, lengths, contexts))
        tokens = self.decodes + self.prompt
        return program(one, self.queries(tokens), len(pool), *arrays, size=size)

    def tiny(self) -> Self:
        return replace(super().tiny(), decodes=3, context=20, prompt=13)


@dataclass(frozen=True)
class Rope(Problem):
    """Of decodes where there are up to 256 tokens, each with a page of its own; else of a prompt.

    Queries, keys and values are the same in every layer: in a step, too, the projection has just
    written them.
    """

    op = "rope_kv_write"
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.heads}, {self.tokens} tokens"

    @property
    def work(self) -> Work:
        moved = 2 * ITEM * (self.query_elems + self.kv_elems)
        rotated = self.query_elems + self.kv_elems // 2
        angles = self.shape.head_dim * 4  # float32 sines and cosines of half a head
        return Work(self.tokens * (moved + angles), self.tokens * 3 * rotated)

    def program(self, backend: Backend, size: Size) -> Program:
        per_page = 1 if self.tokens <= 256 else PAGE_SIZE
        token = np.arange(self.tokens)
        pages = ceil_div(self.tokens, per_page)
        shuffled = np.random.default_rng(0).permutation(np.arange(1, pages + 1))
        where = shuffled[token // per_page], token % PAGE_SIZE
        qkv = random_array((self.tokens, self.query_elems + self.kv_elems))
        angles = random_array((self.tokens, self.shape.head_dim // 2), jnp.float32)

        def one(pool, layer, *arrays):
            static = {"heads": self.shape.num_attention_heads, "layout": self.layout}
            q, pool = rope_kv_write(pool, layer, *arrays, **static, backend=backend)
            return pool, q

        arrays = qkv, jnp.cos(angles), jnp.sin(angles), *(jnp.asarray(w, jnp.int32) for w in where)
        pool = self.pool(pages + 1, size)
        return program(one, pool, len(pool), *arrays, size=size)

    def tiny(self) -> Self:
        return replace(super().tiny(), tokens=8 if self.tokens <= 256 else 264)
