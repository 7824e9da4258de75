# SPDX-License-Identifier: Apache-2.0
"""Projections: the base model's, and LoRA on it with adapters in random pages."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Work, random_array
from benchmarks.problems import ITEM, Problem, Program, Size, program
from pallas_kernels import Modules, lora_delta
from pallas_kernels.backend import Backend
from pallas_kernels.layout import ceil_div
from pallas_kernels.segments import Adapters, with_work
from pallas_kernels.skinny_matmul import skinny_matmul
from slora_jax.engine.programs import FEW, PROMPT_BLOCK

DECODE_TOKENS = 64  # of at most so many a step is taken for one of decodes
PROJECTIONS = {  # fused as the model fuses them
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Matmul(Problem):
    """A projection of the base model; of many tokens it is what LoRA's time is compared with.

    Each one waits for the one before by way of a small kernel, whose time is `overhead`.
    """

    op = "skinny_matmul"
    projection: str
    tokens: int

    @property
    def columns(self) -> tuple[int, int]:
        """Inputs and outputs."""
        shapes = [self.shape.projection_shape(module) for module in PROJECTIONS[self.projection]]
        return shapes[0][0], sum(outputs for _, outputs in shapes)

    @property
    def name(self) -> str:
        inputs, outputs = self.columns
        return f"{self.projection} {outputs} x {inputs}, {self.tokens} tokens"

    @property
    def work(self) -> Work:
        inputs, outputs = self.columns
        elems = inputs * outputs + self.tokens * (inputs + outputs)
        return Work(elems * ITEM, 2 * self.tokens * inputs * outputs)

    def program(self, backend: Backend, size: Size) -> Program:
        inputs, outputs = self.columns
        count = min(size.layers(inputs * outputs * ITEM), size.length)
        weights = [random_array((outputs, inputs), seed=seed) for seed in range(count)]
        multiply = partial(skinny_matmul, backend=backend)
        return self._in_turn(jax.jit(multiply), weights, size)

    def overhead(self, size: Size) -> Program:
        results = [random_array((self.tokens, self.columns[1]), seed=seed) for seed in range(2)]
        return self._in_turn(lambda _, y: y, results, size)

    def _in_turn(self, multiply: Callable, weights: list[jax.Array], size: Size) -> Program:
        @partial(jax.jit, donate_argnums=0)
        def call(x, weights):
            for weight in itertools.islice(itertools.cycle(weights), size.length):
                # Barriers: all of y is to be computed, and one x is not to be fused with the next.
                y = jax.lax.optimization_barrier(multiply(x, weight))
                x = jax.lax.optimization_barrier(x + y[:, :1] * 0)
            return x

        return lambda x: call(x, weights), random_array((self.tokens, self.columns[0]))

    def tiny(self) -> Self:
        return replace(super().tiny(), tokens=min(self.tokens, 8))


@dataclass(frozen=True)
class Lora(Problem):
    """A fused projection with LoRA on all of its modules.

    Attributes:
        projection: among `PROJECTIONS`.
        ranks: of the distinct adapters.
        each: tokens of every adapter.
    """

    op = "lora_delta"
    projection: str
    ranks: tuple[int, ...]
    each: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every adapter."""
        return (self.each,) * len(self.ranks)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def modules(self) -> Modules:
        shapes = [self.shape.projection_shape(module) for module in PROJECTIONS[self.projection]]
        return Modules(0, shapes[0][0], tuple(outputs for _, outputs in shapes))

    @property
    def name(self) -> str:
        count, ranks = len(self.ranks), sorted(set(self.ranks))
        adapters = f"{count} adapters" if count > 1 else "one adapter"
        of_rank = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        where = f"{self.projection} {self.modules.inputs}"
        return f"{where}, {self.tokens} tokens, {adapters}, {of_rank}"

    @property
    def adapter_elems(self) -> int:
        """Elements of A and B of all modules for each rank of an adapter."""
        modules = self.modules
        return modules.count * modules.inputs + sum(modules.outputs)

    @property
    def work(self) -> Work:
        """Every adapter is read once, x is read, y read and written."""
        ranks, modules = sum(self.ranks), self.modules
        activations = self.tokens * (modules.inputs + 2 * sum(modules.outputs))
        elems = ranks * self.adapter_elems + activations
        products = sum(map(operator.mul, self.lengths, self.ranks))
        return Work(elems * ITEM, 2 * products * self.adapter_elems)

    def program(self, backend: Backend, size: Size) -> Program:
        pool, adapters, x, y = self.data(size)
        static = {"modules": self.modules, "max_rank": max(self.ranks), "layout": self.layout}

        def one(y, layer, x, pool, adapters):
            return lora_delta(x, y, pool, layer, adapters, **static, backend=backend), None

        return program(one, y, len(pool), x, pool, adapters, size=size)

    def data(self, size: Size) -> tuple[jax.Array, Adapters, jax.Array, jax.Array]:
        """The pool, the adapters in it, x and y."""
        modules = self.modules
        pages = [self._pages(rank) for rank in self.ranks]
        read = sum(self.ranks) * self.adapter_elems * ITEM
        # Enough layers that what is read of them is large, not only the pool.
        layers = size.layers(read)
        pool = random_array((layers, sum(pages) + 1, self.layout.page_elems), std=0.02)
        adapters = self._adapters(pages, layers)
        x = random_array((self.tokens, modules.inputs))
        return pool, adapters, x, random_array((self.tokens, sum(modules.outputs)), seed=1)

    def _pages(self, rank: int) -> int:
        tiles = sum(
            self.layout.module_tiles(rank, self.modules.inputs, outputs)
            for outputs in self.modules.outputs
        )
        return ceil_div(tiles, self.layout.tiles_per_page)

    def _adapters(self, pages: list[int], layers: int) -> Adapters:
        """The adapters' tables, as the engine makes them: of single tokens, or of blocks, too."""
        modules = self.modules
        shuffled = np.random.default_rng(0).permutation(np.arange(1, sum(pages) + 1))
        own = np.zeros((len(pages), max(pages)), np.int32)
        first_tile = np.zeros((len(pages), layers + 1, modules.count), np.int32)
        for g, mine in enumerate(np.split(shuffled, np.cumsum(pages)[:-1])):
            own[g, : len(mine)] = mine
            tiles = [
                self.layout.module_tiles(self.ranks[g], modules.inputs, outputs)
                for outputs in modules.outputs
            ]
            first_tile[g] = np.cumsum(tiles) - tiles
        rank = np.broadcast_to(np.asarray(self.ranks, np.int32)[:, None, None], first_tile.shape)
        lengths = np.asarray(self.lengths, np.int32)
        scale = jnp.ones(first_tile.shape, jnp.float32)
        block = 1 if self.tokens <= DECODE_TOKENS else PROMPT_BLOCK
        size = {"layout": self.layout, "tokens": self.tokens, "block": block, "few": FEW}
        make = jax.jit(partial(with_work, **size))
        return make(*map(jnp.asarray, (lengths, own, rank, first_tile)), scale)

    def tiny(self) -> Self:
        few = sorted(set(self.ranks))
        ranks = tuple(few) if len(few) > 1 else self.ranks[:2]
        each = min(self.each, 8 if self.tokens <= DECODE_TOKENS else 40)
        return replace(super().tiny(), ranks=ranks, each=each)


@dataclass(frozen=True)
class MixedLora(Lora):
    """The same in a step that also computes a prompt, of the last adapter.

    Attributes:
        prompt: its tokens.
    """

    prompt: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return (*super().lengths[1:], self.prompt)

    @property
    def name(self) -> str:
        return f"{super().name}, one of a prompt of {self.prompt}"

    def tiny(self) -> Self:
        return replace(super().tiny(), prompt=70)
