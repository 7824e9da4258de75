# SPDX-License-Identifier: Apache-2.0
"""What the Mosaic GPU kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import TILE

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
