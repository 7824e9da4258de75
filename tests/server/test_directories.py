# SPDX-License-Identifier: Apache-2.0
"""Directories whose disk does not answer: only requests that need them wait, and are told."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import directories as module
from server.catalog import Loaded
from server.directories import Directories
from server.errors import Unavailable
from tests.server.test_front_end import World, error, run


class Disk:
    """A disk whose answers about one place have to be waited for."""

    def __init__(self, hangs: str) -> None:
        self.hangs = hangs
        self.answers = threading.Event()
        self.looks = 0

    def look(self, directory: Path) -> tuple:
        if directory.name == self.hangs:
            self.looks += 1
            self.answers.wait()
        return ((1, 1, 1), (1, 1, 1))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk("hangs")
    monkeypatch.setattr(module, "signature_of", disk.look)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
    yield disk
    disk.answers.set()


def test_looks_at_one_place_are_shared(disk: Disk):
    """Those that wait for a look that has begun need a later one: it may have looked too early."""

    async def story() -> None:
        places = Directories(None, ())
        first = asyncio.create_task(places.signature(Path("hangs")))
        await asyncio.sleep(0.1)
        later = [asyncio.create_task(places.signature(Path("hangs"))) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert disk.looks == 1
        disk.answers.set()
        assert len({await one for one in (first, *later)}) == 1
        assert disk.looks == 2

    asyncio.run(story())


def test_a_name_of_the_directory_is_no_path_in_another_root(tmp_path: Path):
    """A name in --lora-dir, and at that moment the same in --lora-roots, which comes first."""

    async def story() -> None:
        roots = [tmp_path / "one", tmp_path / "other"]
        for root in roots:
            (root / "name").mkdir(parents=True)
        places = Directories(roots[1], roots)
        found = await asyncio.gather(places.confined("name"), places.named("name"))
        assert found == [root / "name" for root in roots]

    asyncio.run(story())


def test_a_disk_that_hangs_holds_only_who_looks_at_it(disk: Disk):
    async def story() -> None:
        places = Directories(None, ())
        for _ in range(3):
            began = time.monotonic()
            for found in await asyncio.gather(
                *(places.signature(Path("hangs")) for _ in range(100)), return_exceptions=True
            ):
                assert isinstance(found, Unavailable)
                assert "does not answer" in str(found)
                assert found.retry_after
            assert time.monotonic() - began < 5
            assert await places.signature(Path("fine"))
        assert disk.looks == 1, "one thread hangs, however many ask"
        disk.answers.set()
        assert await places.signature(Path("hangs"))

    asyncio.run(story())


def test_requests_for_other_adapters_go_on(disk: Disk, tmp_path: Path):
    async def story(one: World) -> None:
        for name in ("hangs", "fine"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_config.json").touch()
            signature = ((1, 1, 1), (1, 1, 1))
            one.front.catalog.loaded[name] = Loaded(tmp_path / name, False, 0, signature)
        held = [asyncio.create_task(one.ask(model="hangs")) for _ in range(30)]
        for model in ("fine", "base", "fine"):
            assert (await one.ask(model=model)).status_code == 200
        assert (await one.client.get("/health")).status_code == 200
        for response in await asyncio.gather(*held):
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert "does not answer" in error(response)["message"]

    run(story, lora_dir=tmp_path)


def test_what_cannot_be_read_now_is_not_the_clients_fault(tmp_path: Path):
    async def story(one: World) -> None:
        (tmp_path / "unreadable").mkdir()
        (tmp_path / "unreadable" / "adapter_config.json").touch()
        body = {"lora_name": "unreadable", "lora_path": "unreadable"}
        responses = [
            await one.ask(model="unreadable"),
            await one.client.post("/v1/load_lora_adapter", json=body),
        ]
        for response in responses:
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert "cannot be read" in error(response)["message"]

    run(story, lora_dir=tmp_path, allow_runtime_lora_updating=True)


def test_names_for_no_prompt_are_not_looked_for(tmp_path: Path, monkeypatch):
    """Each one costs a look at the disk."""

    async def story(one: World) -> None:
        monkeypatch.setattr(one.front.catalog._directories, "has", None)
        response = await one.ask(lora_path=[f"name {n}" for n in range(10_000)])
        assert response.status_code == 400
        assert error(response)["param"] == "lora_path"

    run(story, lora_dir=tmp_path)


def test_dots_are_no_names(tmp_path: Path):
    """The directory itself and the one above hold an adapter's configuration."""
    root = tmp_path / "root"
    root.mkdir()
    for place in (tmp_path, root):
        (place / "adapter_config.json").touch()

    async def story() -> None:
        places = Directories(root, (root,))
        assert not [name for name in (".", "..", "../root") if await places.has(name)]

    asyncio.run(story())
