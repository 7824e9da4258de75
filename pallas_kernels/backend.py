# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations runs, decided in one place.

`mosaic` is Pallas Mosaic GPU, for NVIDIA Hopper; `xla` is plain `jax.numpy` and runs everywhere.
Operations that have both take `backend`; whoever builds a program decides once and passes it on.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from pallas_kernels.layout import TILE, PageLayout

Backend = Literal["mosaic", "xla"]
ENVIRONMENT = "SLORA_BACKEND"  # overrides the option; "auto", "mosaic" or "xla"
HOPPER = 9  # the compute capability with TMA and wgmma; later GPUs have other tensor cores


class BackendError(ValueError):
    """A backend was asked for by name and cannot run here."""


def choose_backend(
    option: str, *, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()
) -> Backend:
    """Mosaic where it can run, XLA elsewhere; `option` and the environment can force one.

    Args:
        option: "auto", "mosaic" or "xla".
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
        raise BackendError(f"{where} is {asked!r}; it can be auto, mosaic or xla")
    if asked == "xla":
        return "xla"
    reason = why_not_mosaic(dtype=dtype, layout=layout, widths=widths)
    if reason is None:
        return "mosaic"
    if asked == "mosaic":
        raise BackendError(
            f"{where} asks for the Mosaic GPU kernels, but {reason}. Use auto or xla instead"
        )
    return "xla"


def why_not_mosaic(*, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()) -> str | None:
    """What keeps the Mosaic kernels from running on this process's devices; None: nothing."""
    device = jax.devices()[0]
    name = str(getattr(device, "compute_capability", ""))  # of NVIDIA 9.0, of AMD gfx942
    if device.platform != "gpu" or not name[:1].isdecimal():
        what = device.platform if device.platform != "gpu" else device.device_kind
        return f"they need an NVIDIA GPU, and JAX runs on {what}"
    if int(name.split(".")[0]) != HOPPER:
        return (
            f"they are made for wgmma, which compute capability {HOPPER}.x (Hopper) alone has, "
            f"and {device.device_kind} has {name}"
        )
    return unsupported_shape(dtype=dtype, layout=layout, widths=widths)


def unsupported_shape(*, dtype: Any, layout: PageLayout, widths: Sequence[int] = ()) -> str | None:
    """What the Mosaic kernels do not support in a model's shape, on whatever device."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"they compute in bfloat16 or float16, not {jnp.dtype(dtype).name} (dtype)"
    if layout.head_dim not in (TILE, 2 * TILE):
        return f"they support a head_dim of {TILE} or {2 * TILE}, not {layout.head_dim}"
    if layout.kv_elems != layout.page_elems:
        return f"keys and values must fill whole tiles of a page, and {layout} leaves some empty"
    wrong = [width for width in widths if width % TILE]
    if wrong:
        return f"projections must be multiples of {TILE} wide, not {wrong[0]}"
    return None


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


def _abstract_device():
    """The device that is compiled for, where that is not one of this process's."""
    return getattr(get_abstract_mesh(), "abstract_device", None)
