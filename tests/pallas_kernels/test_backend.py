# SPDX-License-Identifier: Apache-2.0
"""Which backend is chosen, and what is said where it can't be the one asked for."""

from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend
from pallas_kernels.backend import ENVIRONMENT, BackendError, choose_backend, tuned
from pallas_kernels.layout import PageLayout

LAYOUT = PageLayout(kv_heads=8, head_dim=128, page_size=16)
LLAMA = {"dtype": "bfloat16", "layout": LAYOUT, "widths": (4096, 11008)}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Has Triton be missing, or something else be wrong with it, or nothing."""

    def have(reason):
        monkeypatch.setattr(backend, "_why_no_triton", lambda: reason)

    have("install slora-jax[triton]: triton is missing")
    return have


@pytest.fixture
def device(monkeypatch):
    """Has JAX find a device of the test's choosing."""

    def find(platform, kind, capability=None):
        found = SimpleNamespace(platform=platform, device_kind=kind)
        if capability is not None:
            found.compute_capability = capability
        monkeypatch.setattr(jax, "devices", lambda: [found])

    return find


@pytest.fixture
def hopper(device):
    device("gpu", "NVIDIA H200", "9.0")


@pytest.mark.parametrize(
    "found",
    [
        ("cpu", "cpu"),
        ("tpu", "TPU v5e"),
        ("gpu", "Tesla T4", "7.5"),
        ("gpu", "Radeon", "gfx942"),
    ],
    ids=lambda found: found[1],
)
def test_xla_where_no_kernels_can_run(device, triton, found):
    device(*found)
    triton(None)
    assert choose_backend("auto", **LLAMA) == "xla"
    assert choose_backend("xla", **LLAMA) == "xla"
    with pytest.raises(BackendError, match=found[0] if found[0] != "gpu" else found[1]):
        choose_backend("mosaic", **LLAMA)
    with pytest.raises(BackendError, match=found[0] if found[0] != "gpu" else found[1]):
        choose_backend("triton", **LLAMA)


AMPERE_OR_BLACKWELL = [("NVIDIA A100", "8.0"), ("NVIDIA A10", "8.6"), ("NVIDIA B200", "10.0")]


@pytest.mark.parametrize("found", AMPERE_OR_BLACKWELL, ids=lambda found: found[0])
def test_triton_on_other_nvidia_gpus(device, triton, found):
    device("gpu", *found)
    triton(None)
    assert choose_backend("auto", **LLAMA) == choose_backend("triton", **LLAMA) == "triton"
    with pytest.raises(BackendError, match=found[0]):
        choose_backend("mosaic", **LLAMA)


def test_a_warning_where_triton_is_missing(device):
    device("gpu", "NVIDIA A100", "8.0")
    with pytest.warns(UserWarning, match=r"on XLA, slowly.*install slora-jax\[triton\]"):
        assert choose_backend("auto", **LLAMA) == "xla"
    with pytest.raises(BackendError, match=r"install slora-jax\[triton\]"):
        choose_backend("triton", **LLAMA)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"layout": PageLayout(8, 512, 16)}, "head_dim up to 256, not 512"),
    ],
    ids=["dtype", "head_dim"],
)
def test_what_triton_does_not_support_is_named(device, triton, change, reason):
    device("gpu", "NVIDIA A100", "8.0")
    triton(None)
    model = {**LLAMA, **change}
    assert choose_backend("auto", **model) == "xla"
    with pytest.raises(BackendError, match=reason):
        choose_backend("triton", **model)


def test_triton_takes_what_mosaic_does_not(hopper, triton):
    triton(None)
    assert choose_backend("auto", **{**LLAMA, "widths": (4096, 11000)}) == "triton"


def test_mosaic_on_hopper(device):
    device("gpu", "NVIDIA H100", "9.0")
    assert choose_backend("auto", **LLAMA) == "mosaic"
    assert choose_backend("mosaic", **LLAMA) == "mosaic"
    assert choose_backend("xla", **LLAMA) == "xla"


def test_a_refusal_says_who_asked_and_why(device, monkeypatch):
    device("cpu", "cpu")
    with pytest.raises(BackendError, match=r"kernel_backend.*an NVIDIA GPU.*runs on cpu.*auto"):
        choose_backend("mosaic", **LLAMA)
    monkeypatch.setenv(ENVIRONMENT, "mosaic")
    with pytest.raises(BackendError, match=rf"{ENVIRONMENT}.*an NVIDIA GPU"):
        choose_backend("auto", **LLAMA)


def test_the_environment_overrides_the_option(hopper, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "xla")
    assert choose_backend("mosaic", **LLAMA) == "xla"
    monkeypatch.setenv(ENVIRONMENT, "auto")
    assert choose_backend("xla", **LLAMA) == "mosaic"
    monkeypatch.setenv(ENVIRONMENT, "")  # the same as none
    assert choose_backend("xla", **LLAMA) == "xla"


def test_unknown_names_are_refused(hopper, monkeypatch):
    with pytest.raises(BackendError, match=r"kernel_backend is 'cuda'.*mosaic, triton or xla"):
        choose_backend("cuda", **LLAMA)
    monkeypatch.setenv(ENVIRONMENT, "tpu")
    with pytest.raises(BackendError, match=rf"{ENVIRONMENT} is 'tpu'"):
        choose_backend("auto", **LLAMA)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"layout": PageLayout(8, 96, 16)}, "head_dim of 64 or 128, not 96"),
        ({"layout": PageLayout(1, 64, 16)}, "whole tiles"),
        ({"widths": (4096, 11000)}, "multiples of 64 wide, not 11000"),
    ],
    ids=["dtype", "head_dim", "page", "width"],
)
def test_what_mosaic_does_not_support_is_named(hopper, change, reason):
    model = {**LLAMA, **change}
    served = "dtype" not in change  # by Triton, were it there: else there is nothing to install
    with pytest.warns(UserWarning, match="on XLA") if served else nullcontext():
        assert choose_backend("auto", **model) == "xla"
    with pytest.raises(BackendError, match=reason):
        choose_backend("mosaic", **model)


def test_what_mosaic_supports(hopper):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.dtype("bfloat16"), "float16"):
        assert choose_backend("mosaic", **{**LLAMA, "dtype": dtype}) == "mosaic"
    for layout in (PageLayout(1, 128, 16), PageLayout(2, 64, 32), PageLayout(40, 128, 16)):
        assert choose_backend("mosaic", **{**LLAMA, "layout": layout}) == "mosaic"


def test_an_unknown_gpu_is_tuned_as_the_h200(device):
    table = {"NVIDIA H200": 1, "NVIDIA H100 80GB HBM3": 2}
    for kind, line in (("NVIDIA H100 80GB HBM3", 2), ("NVIDIA H200", 1), ("NVIDIA B200", 1)):
        device("gpu", kind, "9.0")
        assert tuned(table) == line
