# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter on NumPy arrays, as a callback of JAX: kernels run where there is no GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


def interpret(
    kernel: Any,
    inputs: Sequence[jax.Array],
    grid: tuple[int, ...],
    updated: jax.Array | None,
    out_type: Sequence[jax.ShapeDtypeStruct],
    constants: Mapping[str, Any],
) -> Sequence[jax.Array]:
    """As `pallas_kernels.triton.launch`; outputs are NaN, or 1, until a kernel writes them."""
    written = () if updated is None else (updated,)

    def call(*arrays: jax.Array) -> Sequence[np.ndarray]:
        copies = [np.array(array) for array in arrays]
        fresh = [np.full(one.shape, _unwritten(one.dtype), one.dtype) for one in out_type]
        kernel[grid](*map(_Tensor, (*copies, *fresh)), **constants)
        return *copies[: len(written)], *fresh

    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in (*written, *out_type)]
    return jax.pure_callback(call, tuple(shapes), *written, *inputs)


def _unwritten(dtype: Any) -> Any:
    return 1 if np.issubdtype(dtype, np.integer) else np.nan


class _Tensor:
    """A NumPy array as far as Triton's interpreter asks a torch tensor.

    It copies what it is given to the host and back; an array is there, and is its own storage.
    """

    def __init__(self, array: np.ndarray):
        self._array = array
        self.dtype = array.dtype.name
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def new_empty(self, *shape: int, device: str) -> "_Tensor":
        return self

    def set_(self, *where: Any) -> None:
        pass

    def copy_(self, other: "_Tensor") -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return ()
