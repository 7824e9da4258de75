# SPDX-License-Identifier: Apache-2.0
"""While testing, the shapes in the signatures of the operations on the pool are checked.

Only theirs: pytrees of weights are also made of shapes and specs, which are no arrays. Nothing is
timed: examples have no deadline. A CPU is eight devices; most tests use the first one only.
"""

import atexit
import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

pytest_plugins = ["tests.resources"]
MOST_MAPS = 8000
_SLOWEST = {"sharding": 4, "engine": 3, "pallas_kernels": 2, "server": 1}  # of the tests' folders

# Mosaic's interpreter has a thread of XLA's pool wait for another one: a pool of as many threads as
# the machine has cores can deadlock. XLA reads this once, when JAX makes its CPU client.
os.environ.setdefault("NPROC", "16")
# With LLVM's optimizations: without, two files of the engine's tests took 147 s, not 171, but the
# demo's test, which runs for long what it compiles, 115 s, not 72.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# Programs are kept as long as the tests run, for later files, for the other workers and for the
# processes that tests start; never among the user's. JAX writes a file at once only where it takes
# a lock, and it takes one where the cache is bounded.
if "PYTEST_XDIST_WORKER" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="slora-jax-tests-")
    atexit.register(programs.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(8 << 30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# Where a GPU is tested, these two may be missing.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("slora", deadline=None)
    settings.load_profile("slora")
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("pallas_kernels", "beartype.beartype")


def pytest_xdist_auto_num_workers() -> int | None:
    """On a GPU one process: JAX takes most of its memory, and several do not fit."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    usable = any(map(importlib.util.find_spec, plugins)) and Path("/dev/nvidiactl").exists()
    return 0 if usable and os.environ.get("JAX_PLATFORMS") != "cpu" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes long, so that no worker ends with it alone: files are given out in order."""
    items.sort(key=lambda item: _SLOWEST.get(item.path.parent.name, 0), reverse=True)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_freed() -> Iterator[None]:
    """After each file: JAX keeps them until it is told. What that comes to is in `resources`."""
    yield
    free_compiled_programs()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Within a file too: one had come to 18 744 maps before it ended."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        free_compiled_programs()


def free_compiled_programs() -> None:
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
