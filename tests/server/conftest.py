# SPDX-License-Identifier: Apache-2.0
"""One server of the shipped model for all tests that leave it as it was."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slora_jax.demo import adapter_dirs
from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def adapters_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --lora-dir: `lazy_upper`, `lazy_rot13`, one that is broken, and a link that leads out."""
    root = tmp_path_factory.mktemp("lora-dir")
    shipped = adapter_dirs()
    for name in ("upper", "rot13"):
        shutil.copytree(shipped[name], root / f"lazy_{name}")
    shutil.copytree(shipped["upper"], root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"nonsense")
    (root / "link").symlink_to(shipped["upper"])
    return root


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, adapters_on_disk: Path
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    cache = adapters_on_disk.with_name(f"{adapters_on_disk.name}-cache")
    cache.mkdir()
    options = ["--lora-dir", str(adapters_on_disk), "--lora-roots", str(cache)]
    options += ["--allow-runtime-lora-updating"]
    with RunningServer(log, *options, "--max-queued-requests", "600") as running:
        yield running.wait_until_ready()
