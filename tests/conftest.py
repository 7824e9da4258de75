# SPDX-License-Identifier: Apache-2.0
"""While testing, the shapes in the signatures of the operations on the pool are checked.

Only theirs: pytrees of weights are also made of shapes and specs, which are no arrays. Nothing is
timed: examples have no deadline. A CPU is eight devices; most tests use the first one only.
"""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

pytest_plugins = ["tests.resources"]

# Mosaic's interpreter has a thread of XLA's pool wait for another one: a pool of as many threads as
# the machine has cores can deadlock. XLA reads this once, when JAX makes its CPU client.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# Where a GPU is tested, these two may be missing.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("slora", deadline=None)
    settings.load_profile("slora")
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("pallas_kernels", "beartype.beartype")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """On a GPU one process: JAX takes most of its memory, and several do not fit."""
    on_gpu = "gpu" in config.option.markexpr or any("tests/gpu" in arg for arg in config.args)
    return 0 if on_gpu else None


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_freed() -> Iterator[None]:
    """JAX keeps them until it is told: what that comes to is in `resources`."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
