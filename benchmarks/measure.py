# SPDX-License-Identifier: Apache-2.0
"""Timing on the device, and what the device could do at best."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

REPETITION_S = 0.03  # least length of a repetition: waiting for its end takes some 50 us


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds: the median of some repetitions, and the fastest and slowest of them."""

    us: float
    us_min: float
    us_max: float

    @classmethod
    def of(cls, us: Sequence[float]) -> "Timing":
        return cls(statistics.median(us), min(us), max(us))

    def each(self, count: int) -> "Timing":
        """Of one of `count` equal parts."""
        return Timing(self.us / count, self.us_min / count, self.us_max / count)

    def without(self, us: float) -> "Timing":
        """Less what does not belong to it."""
        return Timing(self.us - us, self.us_min - us, self.us_max - us)


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation cannot avoid: bytes read and written once each, and FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best that was measured on this device: bytes and FLOPs a second."""

    bandwidth: float
    flops: float

    def limit_us(self, work: Work) -> float:
        """The least time, with traffic and arithmetic side by side."""
        return 1e6 * max(work.bytes / self.bandwidth, work.flops / self.flops)


def measure(call: Callable[[Any], Any], carry: Any, *, repetitions: int = 5) -> Timing:
    """Times `carry = call(carry)`, over and over: a call may donate what it is given.

    Calls are dispatched ahead, so that the device never waits for the host; a repetition ends when
    the device has done all of them. The first call compiles and is not counted.
    """
    assert repetitions >= 3, "a spread of fewer says little"
    for _ in range(2):
        carry = jax.block_until_ready(call(carry))
    start = time.perf_counter()
    carry = jax.block_until_ready(call(carry))
    calls = min(math.ceil(REPETITION_S / (time.perf_counter() - start)), 100)
    us = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        us.append((time.perf_counter() - start) / calls * 1e6)
    return Timing.of(us)


@partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def random_array(
    shape: tuple[int, ...], dtype: Any = jnp.bfloat16, seed: int = 0, std: float = 1.0
) -> jax.Array:
    """Normal numbers, made on the device. (Zeros would flatter it: they take less power.)"""
    key = jax.random.key(seed, impl="rbg")  # compiles in half the time of the default
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def ceilings(*, rows: int = 1 << 16, side: int = 8192) -> tuple[Ceilings, dict[str, Any]]:
    """Measures a copy, a read and a matmul.

    Args:
        rows: of the bfloat16 array of 32768 columns that is copied, and whose rows' greatest are
            found: 4 GiB by default, much more than any cache.
        side: of the square matrices that are multiplied.

    Returns:
        The ceilings, and timing and work of each by name.
    """
    x = random_array((rows, 1 << 15))
    copy, read = jax.jit(jnp.copy), jax.jit(lambda x: x.max(axis=1))
    found = {
        "copy": (measure(lambda _: copy(x), None), Work(2 * x.nbytes, 0)),
        "read": (measure(lambda _: read(x), None), Work(x.nbytes + 2 * rows, 0)),
    }
    a, b = random_array((side, side)), random_array((side, side), seed=1)
    multiply = jax.jit(lambda a, b: a @ b)
    found["matmul"] = (measure(lambda _: multiply(a, b), None), Work(6 * side**2, 2 * side**3))
    rate = {name: (work.bytes, work.flops, timing.us) for name, (timing, work) in found.items()}
    bandwidth = max(1e6 * rate[name][0] / rate[name][2] for name in ("copy", "read"))
    return Ceilings(bandwidth, 1e6 * rate["matmul"][1] / rate["matmul"][2]), found
