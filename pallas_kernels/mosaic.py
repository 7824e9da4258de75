# SPDX-License-Identifier: Apache-2.0
"""What the Mosaic GPU kernels share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import TILE

SHARED_BYTES = 222 << 10  # of a CTA, for arrays; Mosaic needs some of the 227 KiB for itself
ALIGN = 8  # rows of a swizzled tile: copies and operands start at multiples of it
WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)  # of a vector with one number a column


def swizzled(columns: int = TILE, itemsize: int = 2, rows: int = ALIGN) -> tuple[Any, ...]:
    """How wgmma wants a matrix in shared memory: in tiles of 8 rows, swizzled.

    With `rows=1` the bytes lie alike, and copies may start at any row.
    """
    tiling = plgpu.TilingTransform((rows, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(itemsize * columns)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def accumulator(rows: int, columns: int) -> plgpu.WGMMAAccumulatorRef:
    """float32 sums of a wgmma, zero at first; for `pl.run_scoped`."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def iota(rows: int, columns: int, dimension: int) -> jax.Array:
    """Row or column numbers, laid out as a wgmma's result."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, columns), dimension, layout=WGMMA)


def choose(index: Any, values: Sequence[Any]) -> Any:
    """`values[index]`, of a static list."""
    chosen = jnp.int32(values[0])
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(index == i, jnp.int32(value), chosen)
    return chosen


def store(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value`, also where rows are shorter than a cache line or banks conflict."""
    if hasattr(plgpu, "store"):  # since JAX 0.12, where an assignment insists on whole lines
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
