# SPDX-License-Identifier: Apache-2.0
"""What a problem is: an operation with data as a server would give it, and what it has to do.

Data is random and made on the device. A program does an operation several times in a row, each on
another layer of a pool that is much larger than the caches, so that nothing is read from them that
would not be there in a step of a model.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from benchmarks.measure import Work, random_array
from benchmarks.shapes import TINY
from pallas_kernels import (
    PageLayout,
)
from pallas_kernels.backend import Backend
from pallas_kernels.layout import ceil_div
from slora_jax.config import ModelConfig

PAGE_SIZE = 16
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done at once: operations of a program, and least bytes of their data."""

    length: int
    data_bytes: int

    def layers(self, bytes_of_one: int) -> int:
        """How many layers of data there are."""
        return min(max(ceil_div(self.data_bytes, bytes_of_one), 1), 256)


type Call = Callable[[Any], Any]
type Program = tuple[Call, Any]  # what `measure` takes


def program(one: Callable[..., Any], carry: Any, layers: int, *arrays: Any, size: Size) -> Program:
    """`carry, _ = one(carry, layer, *arrays)`, `size.length` times in a call, layers in turn.

    The layer is traced, so that a kernel compiles once; and it is an argument, since arithmetic on
    it would be a kernel of its own.
    """
    inner = jax.jit(one)

    @partial(jax.jit, donate_argnums=0)
    def call(carry, numbers, *arrays):
        results = []
        for number in numbers:
            carry, result = inner(carry, number, *arrays)
            results.append(result)
        return carry, results

    # The same arguments in every call: with others a host took 14 us for the two launches of
    # Triton's LoRA instead of 10 to 13, and the shortest take 11.
    numbers = itertools.cycle([jnp.int32(layer) for layer in range(layers)])
    some = tuple(itertools.islice(numbers, size.length))
    return lambda carry: call(carry, some, *arrays)[0], carry


@dataclass(frozen=True)
class Problem:
    """An operation on a model's shape. Fields are what a result is recorded with."""

    op: ClassVar[str]
    model: str
    shape: ModelConfig

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def work(self) -> Work:
        raise NotImplementedError

    def program(self, backend: Backend, size: Size) -> Program:
        """Data and program on the device."""
        raise NotImplementedError

    def overhead(self, size: Size) -> Program | None:
        """What the program does beside the operation, if anything; to be subtracted."""
        return None

    def tiny(self) -> Self:
        """The same small enough for a CPU."""
        return replace(self, shape=TINY)

    @property
    def heads(self) -> str:
        return f"{self.shape.num_attention_heads}/{self.shape.num_key_value_heads} heads"

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.shape.num_key_value_heads, self.shape.head_dim, PAGE_SIZE)

    @property
    def query_elems(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_dim

    @property
    def kv_elems(self) -> int:
        """Elements of a token's key and value."""
        return 2 * self.shape.num_key_value_heads * self.shape.head_dim

    def queries(self, tokens: int) -> jax.Array:
        return random_array((tokens, self.shape.num_attention_heads, self.shape.head_dim))

    def pool(self, pages: int, size: Size) -> jax.Array:
        elems = self.layout.page_elems
        return random_array((size.layers(pages * elems * ITEM), pages, elems))
