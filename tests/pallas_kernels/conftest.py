# SPDX-License-Identifier: Apache-2.0
"""Every operation is tested on pages of several shapes, in each of its implementations."""

import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Backend, unsupported_shape
from pallas_kernels.layout import PageLayout
from pallas_kernels.paged_decode.tuning import TRITON as TRITON_DECODE
from pallas_kernels.paged_decode.tuning import TritonTuning as TritonDecode
from pallas_kernels.paged_prefill.tuning import TUNING as PREFILL
from tests.pallas_kernels.pages import LAYOUTS, Pages


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mosaic's interpreter takes half a minute for some cases: without a GPU those are long."""
    for item in items:
        marked = item.get_closest_marker("long_in_mosaics_interpreter")
        params = item.callspec.params if isinstance(item, pytest.Function) and marked else {}
        if params.get("backend") == "mosaic" and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.long)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> PageLayout:
    return request.param


@pytest.fixture
def pages(layout) -> Pages:
    return Pages(layout)


@pytest.fixture(params=get_args(Backend))
def backend(request, capsys, monkeypatch) -> Iterator[Backend]:
    """Runs a test once for every implementation, on the layouts that it supports.

    Without a GPU, Mosaic's kernels run in its interpreter, which fills fresh memory with NaN and
    watches for races between the threads of a CTA (between CTAs it sees none), and Triton's in its
    own, which takes one program after another and whose operators are NumPy's.
    """
    if request.param == "xla":
        yield request.param
        return
    if "layout" in request.fixturenames:
        layout = request.getfixturevalue("layout")
        if reason := unsupported_shape(request.param, dtype=jnp.bfloat16, layout=layout):
            pytest.skip(reason)
    if jax.default_backend() == "gpu":
        yield request.param
        return
    if request.param == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported
            pytest.skip("Triton's interpreter has a process of its own: TRITON_INTERPRET=1 pytest")
        split = TritonDecode(programs=64, block_keys=16, max_splits=4)
        monkeypatch.setitem(TRITON_DECODE, min(TRITON_DECODE), split)
        tuning = importlib.import_module("pallas_kernels.lora_triton").TUNING  # needs the extra
        whole = replace(tuning[min(tuning)], whole_ranks=256, whole_programs=1)
        monkeypatch.setitem(tuning, min(tuning), whole)
        yield request.param
        return
    # The interpreter runs one CTA after another: as few as show how they share the work.
    few = replace(PREFILL["NVIDIA H200"], ctas=3, block_keys=64)
    monkeypatch.setitem(PREFILL, jax.devices()[0].device_kind, few)
    # NaN of foreign pages, in scores that are masked later on.
    warnings.filterwarnings("ignore", "invalid value encountered")  # until the test's end
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield request.param
    assert "RACE DETECTED" not in capsys.readouterr().out  # JAX 0.12 raises, 0.11 prints


@pytest.fixture
def dtype(backend) -> jnp.dtype:
    """What to test an implementation in: the most exact that it supports."""
    if backend == "triton" and jax.default_backend() != "gpu":
        return jnp.dtype(jnp.float16)  # NumPy has no bfloat16, and Triton's interpreter truncates
    return jnp.dtype(jnp.float32 if backend == "xla" else jnp.bfloat16)
