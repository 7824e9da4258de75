# SPDX-License-Identifier: Apache-2.0
"""`skinny_matmul` as XLA multiplies."""

import jax
import jax.numpy as jnp


def skinny_matmul(x, weight, *, gated: bool = False, whole: bool = False):
    """See `pallas_kernels.skinny_matmul.skinny_matmul`."""
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    if not gated:
        return y
    return silu_gated(y)


def silu_gated(y):
    """See `pallas_kernels.skinny_matmul.silu_gated`."""
    gate, up = jnp.split(y.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(y.dtype)
