# SPDX-License-Identifier: Apache-2.0
"""Adapters that come and go at run time, from where they may come, and --lora-dir."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.directories import confined
from server.errors import Invalid, NotFound
from slora_jax.demo import adapter_dirs
from tests.server.running import RunningServer


def load(server, **fields):
    return server.post("/v1/load_lora_adapter", fields)


def unload(server, name: str):
    return server.post("/v1/unload_lora_adapter", {"lora_name": name})


def ask(server, model: str):
    body = {"model": model, "prompt": "hello", "temperature": 0, "max_tokens": 32}
    return server.post("/v1/completions", body)


def text(server, model: str) -> str:
    return ask(server, model).raise_for_status().json()["choices"][0]["text"]


def test_load_replace_and_unload(server, adapters_on_disk):
    path = str(adapters_on_disk / "lazy_upper")
    assert ask(server, "mine").status_code == 404
    loaded = load(server, lora_name="mine", lora_path=path)
    assert loaded.text == "Success: LoRA adapter 'mine' added successfully."
    assert text(server, "mine") == "HELLO"

    again = load(server, lora_name="mine", lora_path=path)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    # Relative to an allowed directory, and in place of the other.
    inplace = load(server, lora_name="mine", lora_path="lazy_rot13", load_inplace=True)
    assert inplace.status_code == 200
    assert text(server, "mine") == "uryyb"

    gone = unload(server, "mine")
    assert gone.text == "Success: LoRA adapter 'mine' removed successfully."
    assert ask(server, "mine").status_code == 404
    missing = unload(server, "mine")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "NotFoundError"


def test_a_pinned_adapter_enters_the_pool_at_once(server):
    load(server, lora_name="pinned", lora_path="lazy_upper", pinned=True).raise_for_status()

    def entry() -> list[dict]:
        return [one for one in server.status()["residents"] if "pinned" in one["names"]]

    server.wait_for(entry)
    assert entry()[0]["pinned"]
    unload(server, "pinned").raise_for_status()


def test_aliases(server):
    body = {"lora_name": "alias", "lora_path": "lazy_upper"}
    assert server.post("/load_lora_adapter", body).status_code == 200
    assert server.post("/unload_lora_adapter", body).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"lora_name": "slora-demo", "lora_path": "lazy_upper"}, 400, "conflicts with a served"),
        ({"lora_name": "x", "lora_path": "broken"}, 400, "adapter_model.safetensors"),
        ({"lora_name": "x", "lora_path": "not_there"}, 404, "no such directory"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "outside"),
        ({"lora_name": "x", "lora_path": "../.."}, 400, "outside"),
        ({"lora_name": "x", "lora_path": "lazy_upper/../../x"}, 400, "outside"),
        ({"lora_name": "x", "lora_path": "link"}, 400, "outside"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "no path"),
        ({"lora_name": "", "lora_path": "lazy_upper"}, 400, "lora_name"),
        ({"lora_name": "a,b", "lora_path": "lazy_upper"}, 400, "lora_name"),
        ({"lora_name": "a\x7f", "lora_path": "lazy_upper"}, 400, "lora_name"),
        ({"lora_name": "a\x9b1m", "lora_path": "lazy_upper"}, 400, "lora_name"),
        ({"lora_name": "a\u2028b", "lora_path": "lazy_upper"}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path is required"),
    ],
)
def test_what_is_refused(server, fields, status, words):
    response = load(server, **fields)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_directory_adapters_load_on_their_first_request(server):
    """Many first requests at once load it once; a broken one says why, one outside is none."""
    server.post("/v1/unload_lora_adapter", {"lora_name": "lazy_upper"})
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda _: text(server, "lazy_upper"), range(8)))
    assert texts == ["HELLO"] * 8
    broken = ask(server, "broken")
    assert broken.status_code == 400
    assert "adapter_model.safetensors" in broken.json()["error"]["message"]
    assert ask(server, "link").status_code == 400
    assert ask(server, "../lora-dir/lazy_upper").status_code == 404
    # Unloaded, it comes back when somebody names it.
    assert unload(server, "lazy_upper").status_code == 200
    assert text(server, "lazy_upper") == "HELLO"


def test_a_directory_that_is_written_anew(server, adapters_on_disk):
    """Is served as it is now; and as it was, if what is there now is refused."""
    directory = adapters_on_disk / "changing"
    shutil.copytree(adapter_dirs()["upper"], directory)
    assert text(server, "changing") == "HELLO"
    shutil.copytree(adapter_dirs()["rot13"], directory, dirs_exist_ok=True)
    assert text(server, "changing") == "uryyb"
    (directory / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert text(server, "changing") == "uryyb"
    shutil.rmtree(directory)
    assert text(server, "changing") == "uryyb"
    unload(server, "changing").raise_for_status()
    assert ask(server, "changing").status_code == 404


def test_what_a_name_leads_to_is_served(server, adapters_on_disk):
    """A deployment that flips a link; Kubernetes flips one inside of the directory."""
    shipped = {name: adapter_dirs()[name] for name in ("upper", "rot13")}
    for name, directory in shipped.items():
        shutil.copytree(directory, adapters_on_disk / f"release_{name}")
    current = adapters_on_disk / "current"
    mounted = adapters_on_disk / "mounted"
    mounted.mkdir()
    for file in shipped["upper"].iterdir():
        (mounted / file.name).symlink_to(f"..data/{file.name}")

    def flip(name: str) -> None:
        for link, target in (
            (current, f"release_{name}"),
            (mounted / "..data", adapters_on_disk / f"release_{name}"),
        ):
            link.with_name("new").symlink_to(target)
            link.with_name("new").replace(link)

    for name, answer in (("upper", "HELLO"), ("rot13", "uryyb"), ("upper", "HELLO")):
        flip(name)
        assert text(server, "current") == answer
        assert text(server, "mounted") == answer
    # A directory is renamed, and another one comes in its place, as old as the first.
    (adapters_on_disk / "release_upper").rename(adapters_on_disk / "release_old")
    shutil.copytree(shipped["rot13"], adapters_on_disk / "release_upper")
    assert text(server, "current") == "uryyb"
    assert text(server, "release_upper") == "uryyb"


def test_what_is_listed_can_be_used(server, adapters_on_disk):
    """Links may lead to --lora-roots, as into Hugging Face's cache, and nowhere else."""

    def listed() -> set[str]:
        return {one["id"] for one in server.get("/v1/models").json()["data"]}

    assert "link" not in listed(), "it leads out"
    (adapters_on_disk / "half").mkdir()
    (adapters_on_disk / "half" / "adapter_config.json").write_text("{}")
    assert "half" not in listed(), "it has no tensors"
    shutil.copytree(adapter_dirs()["upper"], adapters_on_disk / "refused")
    (adapters_on_disk / "refused" / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert ask(server, "refused").status_code == 400
    assert "refused" not in listed()
    shutil.copytree(adapter_dirs()["upper"], adapters_on_disk / "refused", dirs_exist_ok=True)
    assert "refused" in listed(), "it has been written anew"
    assert text(server, "refused") == "HELLO"
    shutil.rmtree(adapters_on_disk / "refused")
    assert "refused" not in listed()

    cache = adapters_on_disk.with_name(f"{adapters_on_disk.name}-cache")  # one of --lora-roots
    snapshot = cache / "models--me--sql" / "snapshots" / "abc"
    blobs = cache / "models--me--sql" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(adapter_dirs()["upper"].iterdir()):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (adapters_on_disk / "sql").symlink_to(snapshot)
    assert "sql" in listed()
    assert text(server, "sql") == "HELLO"
    load(server, lora_name="direct", lora_path=str(snapshot)).raise_for_status()
    assert text(server, "direct") == "HELLO"


def test_directories_that_no_adapter_may_be_called(server, adapters_on_disk):
    """Gateways read lists of names."""
    shutil.copytree(adapter_dirs()["upper"], adapters_on_disk / "a,b")
    assert ask(server, "a,b").status_code == 404
    assert "a,b" not in {one["id"] for one in server.get("/v1/models").json()["data"]}


@pytest.mark.long  # a server of its own
def test_loading_must_be_enabled(tmp_path):
    options = ["--model", "tests/golden/mha/model", "--lora-dir", "tests/golden/mha/adapters"]
    with RunningServer(tmp_path / "log", *options).wait_until_ready() as running:
        refused = load(running, lora_name="x", lora_path="attention")
        assert refused.status_code == 403
        assert "--allow-runtime-lora-updating" in refused.json()["error"]["message"]
        assert unload(running, "x").status_code == 403
        body = {"model": "attention", "prompt": [1, 2, 3], "max_tokens": 4}
        assert running.post("/v1/completions", body).status_code == 200


# Where adapters may be loaded from


@pytest.fixture
def roots(tmp_path) -> list[Path]:
    for name in ("one", "two", "secret"):
        shutil.copytree(adapter_dirs()["upper"], tmp_path / name / "upper")
    return [tmp_path / "one", tmp_path / "two"]


def test_inside(roots, tmp_path):
    inside = roots[1].resolve() / "upper"
    assert confined(str(inside), roots) == inside
    assert confined("upper", roots) == roots[0].resolve() / "upper"
    (roots[0] / "alias").symlink_to(inside)  # from one allowed place to another
    assert confined("alias", roots) == inside
    with pytest.raises(NotFound):
        confined("nothing", roots)


@pytest.mark.parametrize("path", ["secret/upper", "/", "../secret/upper", "one/../../secret/upper"])
def test_outside(roots, tmp_path, path):
    with pytest.raises(Invalid, match="outside"):
        confined(str(tmp_path / path), roots)


def test_links_that_lead_out(roots, tmp_path):
    (roots[0] / "folder").symlink_to(tmp_path / "secret" / "upper")
    with pytest.raises(Invalid, match="outside"):
        confined("folder", roots)
    weights = roots[0] / "upper" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret" / "upper" / "adapter_model.safetensors")
    with pytest.raises(Invalid, match="is a link to a place outside"):
        confined("upper", roots)
    (roots[0] / "circle").symlink_to(roots[0] / "circle")
    with pytest.raises((Invalid, NotFound)):
        confined("circle", roots)
