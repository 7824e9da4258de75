# SPDX-License-Identifier: Apache-2.0
"""How Triton kernels are launched: the one file that knows jax-triton, and its versions' troubles.

Imported only where the Triton kernels were chosen: they are an extra (`slora-jax[triton]`).
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton import knobs

from pallas_kernels.triton_interpreter import interpret

# Of a program, by compute capability: the CUDA programming guide's technical specifications.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1: on NumPy arrays, without a GPU


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a function as the source has it, whatever an import hook made of it."""
    return triton.jit(inspect.unwrap(function))


def launch(
    kernel: Any,
    *inputs: jax.Array,
    grid: tuple[int, ...],
    updated: jax.Array | None = None,
    out_type: Sequence[jax.ShapeDtypeStruct] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> Any:
    """Runs a kernel whose parameters are `updated`, `inputs`, outputs and then constants.

    Args:
        kernel: of `jit`; every constant is annotated with `tl.constexpr`.
        grid: programs along each axis.
        updated: an array that the kernel writes into; not copied if the caller's jit donates it.
        out_type: of the outputs; what the kernel does not write of them may be anything.
        num_warps, num_stages: of a program, and of its loops' pipelines.

    Returns:
        The updated array, if any, and the outputs; of one of them, it alone.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if INTERPRETED:
        found = interpret(kernel, inputs, grid, updated, out_type, constants)
    else:
        call = jax_triton().triton_call
        static = {"kernel": kernel, "grid": grid, "name": kernel.fn.__name__, **options}
        if updated is None:
            found = call(*inputs, out_type=tuple(out_type), **static, **constants)
        else:
            ref = jax.new_ref(updated)
            outputs = call(ref, *inputs, out_type=tuple(out_type), **static, **constants)
            found = (jax.freeze(ref), *outputs)
    return found[0] if len(found) == 1 else tuple(found)


def why_not() -> str | None:
    """What is wrong with the installed versions; None: nothing.

    Triton 3.6 to 3.7 with jax-triton 0.4.1 and later are known to work.
    """
    try:
        jax_triton()
    except ImportError as error:
        return f"jax-triton cannot be imported ({error}); it works with triton 3.6 and 3.7"
    return None


def tuned[T](table: Mapping[int, T]) -> T:
    """The line of a tuning table for the GPU that is compiled for.

    Args:
        table: by compute capability. A GPU without a line of its own gets that of the last
            generation before; in the interpreter it is the first.
    """
    capability = min(table) if INTERPRETED else _capability()
    return table[max((one for one in table if one <= capability), default=min(table))]


def stages(wanted: int, *, step: int, fixed: int = 0) -> int:
    """Of a loop's pipeline: as many as are wanted, or as shared memory holds.

    Args:
        step: bytes that the operands of a step take.
        fixed: bytes that all steps use.
    """
    if INTERPRETED:
        return wanted
    free = (SHARED_KIB.get(_capability(), min(SHARED_KIB.values())) << 10) - fixed
    return max(min(wanted, free // step), 1)


def _capability() -> int:
    """Times ten, of the GPU that is compiled for."""
    return jax_triton().triton_lib.make_cuda_target(None, 1).arch


def power_of_two(n: int) -> int:
    """The smallest one that is at least n: Triton's blocks have such sides."""
    return 1 << (n - 1).bit_length()


def scalar(x: jax.Array) -> jax.Array:
    """A number as an array of one, which a kernel gets a pointer to."""
    return jnp.reshape(x, 1).astype(jnp.int32)


def jax_triton() -> Any:
    """The package, once what its versions need has been done for it."""
    driver: Any = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(driver, "TMA_TF32"):  # jax-triton 0.4.1 wants it, triton has it since 3.7
        driver.TMA_TF32 = 0
    package = importlib.import_module("jax_triton")
    _take_live_inputs(package.triton_lib)
    return package


def _take_live_inputs(library: Any) -> None:
    """Since 0.12, JAX asks rules of dead code elimination with an argument more.

    jax-triton 0.4.1 has one of two arguments, and no kernel lowers.
    """
    rules, primitive = library.pe.dce_rules, library.triton_kernel_call_p
    rule = rules[primitive]
    if rule.__code__.co_argcount == 2 and jax.__version_info__ >= (0, 12):
        rules[primitive] = lambda used, live, equation: rule(used, equation)
