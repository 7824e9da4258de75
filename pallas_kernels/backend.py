# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations runs, decided in one place.

`mosaic` is Pallas Mosaic GPU, for NVIDIA Hopper; `triton` is Triton, for NVIDIA GPUs since Ampere,
with the extra of that name; `xla` is plain `jax.numpy` and runs everywhere. Operations take
`backend`; whoever builds a program decides once and passes it on.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from pallas_kernels.layout import TILE, PageLayout

Backend = Literal["mosaic", "triton", "xla"]
ENVIRONMENT = "SLORA_BACKEND"  # overrides the option; "auto" or a backend
HOPPER = 9  # the compute capability with TMA and wgmma; later GPUs have other tensor cores
AMPERE = 8  # the first with bfloat16
TRITON_HEAD_DIM = 256  # of a query and a block of keys, which shared memory holds


class BackendError(ValueError):
    """A backend was asked for by name and cannot run here."""


def implementation(operation: str, backend: Backend) -> Any:
    """The module of an operation's package that runs on a backend, imported when it is first asked.

    Args:
        operation: the package's name.
    """
    return importlib.import_module(f"{operation}.{'reference' if backend == 'xla' else backend}")


def choose_backend(
    option: str, *, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()
) -> Backend:
    """Mosaic where it can run, else Triton where it can, else XLA; or the one that is asked for.

    Warns where an NVIDIA GPU is left to XLA that Triton could serve, were it installed.

    Args:
        option: "auto" or a backend; the environment overrides it.
        dtype: of the pool.
        layout: of its pages.
        widths: inputs and outputs of the projections.

    Raises:
        BackendError: the name is unknown, or names a backend that cannot run; says why.
    """
    asked, where = option, "the option kernel_backend"
    if os.environ.get(ENVIRONMENT):
        asked, where = os.environ[ENVIRONMENT], f"the environment variable {ENVIRONMENT}"
    if asked not in ("auto", *get_args(Backend)):
        raise BackendError(f"{where} is {asked!r}; it can be auto, mosaic, triton or xla")
    if asked == "xla":
        return "xla"
    reasons: dict[Backend, Callable[[], str | None]] = {
        "mosaic": lambda: why_not_mosaic(dtype=dtype, layout=layout, widths=widths),
        "triton": lambda: why_not_triton(dtype=dtype, layout=layout),
    }
    for backend, why_not in reasons.items():
        if asked not in ("auto", backend):
            continue
        reason = why_not()
        if reason is None:
            return backend
        if asked == backend:
            kernels = {"mosaic": "Mosaic GPU", "triton": "Triton"}[asked]
            raise BackendError(
                f"{where} asks for the {kernels} kernels, but {reason}. Use auto or xla instead"
            )
    could = _capability() >= AMPERE and not unsupported_shape("triton", dtype=dtype, layout=layout)
    if could and (reason := _why_no_triton()):
        warnings.warn(f"the kernels run on XLA, slowly: for Triton's, {reason}", stacklevel=2)
    return "xla"


def why_not_mosaic(*, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()) -> str | None:
    """What keeps the Mosaic kernels from running on this process's devices; None: nothing."""
    capability = _capability()
    if not capability:
        return _no_nvidia()
    if int(capability) != HOPPER:
        return (
            f"they are made for wgmma, which compute capability {HOPPER}.x (Hopper) alone has, "
            f"and {jax.devices()[0].device_kind} has {capability}"
        )
    return unsupported_shape("mosaic", dtype=dtype, layout=layout, widths=widths)


def why_not_triton(*, dtype: Any, layout: PageLayout) -> str | None:
    """What keeps the Triton kernels from running on this process's devices; None: nothing."""
    capability = _capability()
    if not capability:
        return _no_nvidia()
    if capability < AMPERE:
        kind = jax.devices()[0].device_kind
        return f"they need compute capability {AMPERE}.0 or later, and {kind} has {capability}"
    return _why_no_triton() or unsupported_shape("triton", dtype=dtype, layout=layout)


def unsupported_shape(
    backend: Backend, *, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()
) -> str | None:
    """What a backend's kernels do not support in a model's shape, on whatever device."""
    if backend == "xla":
        return None
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"they compute in bfloat16 or float16, not {jnp.dtype(dtype).name} (dtype)"
    if backend == "triton":
        if layout.head_dim > TRITON_HEAD_DIM:
            return f"they support a head_dim up to {TRITON_HEAD_DIM}, not {layout.head_dim}"
        return None
    if layout.head_dim not in (TILE, 2 * TILE):
        return f"they support a head_dim of {TILE} or {2 * TILE}, not {layout.head_dim}"
    if layout.kv_elems != layout.page_elems:
        return f"keys and values must fill whole tiles of a page, and {layout} leaves some empty"
    wrong = [width for width in widths if width % TILE]
    if wrong:
        return f"projections must be multiples of {TILE} wide, not {wrong[0]}"
    return None


def _capability() -> float:
    """Of this process's NVIDIA GPUs; 0 where there is none."""
    device = jax.devices()[0]
    name = str(getattr(device, "compute_capability", ""))  # of NVIDIA 9.0, of AMD gfx942
    return float(name) if device.platform == "gpu" and name[:1].isdecimal() else 0.0


def _no_nvidia() -> str:
    device = jax.devices()[0]
    what = device.platform if device.platform != "gpu" else device.device_kind
    return f"they need an NVIDIA GPU, and JAX runs on {what}"


def _why_no_triton() -> str | None:
    """What must be installed for Triton's kernels; None: nothing."""
    missing = [name for name in ("triton", "jax_triton") if not importlib.util.find_spec(name)]
    if missing:
        return f"install slora-jax[triton]: {missing[0]} is missing"
    return importlib.import_module("pallas_kernels.triton").why_not()


def interpreted() -> bool:
    """Whether Mosaic kernels run in the interpreter: without a GPU, and not compiled for one.

    It knows no register operands of wgmma and no stores into another CTA's memory; a kernel that
    uses them has a slower form for it.
    """
    return _abstract_device() is None and jax.default_backend() != "gpu"


def tuned[T](table: Mapping[str, T]) -> T:
    """The line of a tuning table for the GPU that is compiled for; the H200's for one unknown."""
    abstract = _abstract_device()
    kind = abstract.device_kind if abstract is not None else jax.devices()[0].device_kind
    return table.get(kind, table["NVIDIA H200"])


def multiprocessors() -> int:
    """Of the GPU that is compiled for; 1 where there is none."""
    abstract = _abstract_device()
    return (
        abstract.num_cores if abstract is not None else getattr(jax.devices()[0], "core_count", 1)
    )


def _abstract_device():
    """The device that is compiled for, where that is not one of this process's."""
    return getattr(get_abstract_mesh(), "abstract_device", None)
