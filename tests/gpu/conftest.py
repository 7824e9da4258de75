# SPDX-License-Identifier: Apache-2.0
"""What runs on an NVIDIA GPU, once with each backend that it has kernels of; else it is skipped."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import PageLayout
from pallas_kernels.backend import Backend, why_not_mosaic, why_not_triton


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent.name == "gpu"]
    if not here:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    found = jax.default_backend() == "gpu"
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not found:
            item.add_marker(skip)


@pytest.fixture(params=["mosaic", "triton"])
def backend(request) -> Backend:
    model = {"dtype": jnp.bfloat16, "layout": PageLayout(kv_heads=8, head_dim=128, page_size=16)}
    if reason := {"mosaic": why_not_mosaic, "triton": why_not_triton}[request.param](**model):
        pytest.skip(reason)
    return request.param
