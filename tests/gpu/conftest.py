# SPDX-License-Identifier: Apache-2.0
"""What runs on an NVIDIA GPU of the Hopper generation, and is skipped elsewhere."""

import jax
import pytest


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent.name == "gpu"]
    if not here:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (Hopper)")
    found = jax.default_backend() == "gpu"
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not found:
            item.add_marker(skip)
