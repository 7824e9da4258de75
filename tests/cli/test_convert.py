# SPDX-License-Identifier: Apache-2.0
"""`slora convert`: bit for bit there and back, all files with it, and nothing left of a failure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from slora_jax.cli import main
from slora_jax.model import writer
from slora_jax.model.orbax import OrbaxCheckpoint
from tests.sharding.models import GQA, write_model

FILES = {  # beside the weights, and whether they go along
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "README.md": True,
    "LICENSE": True,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    ".gitattributes": False,
}


def model_of(root: Path, dtype=np.float32) -> Path:
    """A model with a tied head that is stored all the same, and a buffer."""
    model = write_model(root / "hf", GQA)
    tensors = load_file(model / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | buffer, model / "model.safetensors", metadata={"format": "pt"})
    return model


def weights_of(model: Path) -> dict[str, tuple]:
    """Name, type, shape and bits of what safetensors hold."""
    tensors = {}
    for path in model.glob("*.safetensors"):
        tensors |= load_file(path)
    return {
        name: (tensor.dtype, tensor.shape, tensor.tobytes())
        for name, tensor in tensors.items()
        if not name.endswith("inv_freq")
    }


def convert(*argv: str | Path) -> int:
    return main(["convert", "--quiet", *map(str, argv)])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_there_and_back(tmp_path, dtype):
    model = model_of(tmp_path, dtype)
    assert convert(model, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert sorted(p.name for p in (tmp_path / "orbax").iterdir()) == ["config.json", "orbax"]
    names = sorted(p.name for p in (tmp_path / "back").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert weights_of(tmp_path / "back") == weights_of(model)
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_large_models_are_several_files_with_an_index(tmp_path, monkeypatch):
    model = model_of(tmp_path)
    assert convert(model, tmp_path / "orbax") == 0
    monkeypatch.setattr(writer, "_FILE_BYTES", 60_000)
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert weights_of(tmp_path / "back") == weights_of(model)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    sizes = []
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}  # which transformers asks for
            assert {name for name, home in index["weight_map"].items() if home == path.name} == {
                *file.keys()
            }
        sizes.append(sum(tensor.nbytes for tensor in load_file(path).values()))
    assert max(sizes) <= 60_000
    assert index["metadata"]["total_size"] == sum(sizes)
    # And on to other files of the same format.
    monkeypatch.undo()
    assert convert(tmp_path / "back", tmp_path / "one", "--to", "safetensors") == 0
    assert weights_of(tmp_path / "one") == weights_of(model)
    assert (tmp_path / "one" / "model.safetensors").exists()


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
def test_casts_and_says_so_in_the_config(tmp_path, field):
    model = model_of(tmp_path)
    config = json.loads((model / "config.json").read_text())
    del config["torch_dtype"]
    config |= {field: "float32"} if field else {}
    (model / "config.json").write_text(json.dumps(config))
    assert convert(model, tmp_path / "orbax", "--dtype", "bfloat16") == 0
    written = json.loads((tmp_path / "orbax" / "config.json").read_text())
    assert written == config | {field or "dtype": "bfloat16"}
    with OrbaxCheckpoint(tmp_path / "orbax") as checkpoint:
        for name, tensor in load_file(model / "model.safetensors").items():
            if not name.endswith("inv_freq"):
                expected = tensor.astype(ml_dtypes.bfloat16)
                assert checkpoint.read(name).tobytes() == expected.tobytes()


def test_tensors_of_several_types_keep_theirs(tmp_path):
    model = model_of(tmp_path, ml_dtypes.bfloat16)
    tensors = load_file(model / "model.safetensors")
    tensors = {k: v.astype(np.float32) if "norm" in k else v for k, v in tensors.items()}
    save_file(tensors, model / "model.safetensors")
    assert convert(model, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert weights_of(tmp_path / "back") == weights_of(model)


def test_other_files_go_along(tmp_path):
    model = model_of(tmp_path)
    for name in FILES:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}" if name == "generation_config.json" else name)
    assert convert(model, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    for target in (tmp_path / "orbax", tmp_path / "back"):
        assert {name: (target / name).exists() for name in FILES} == FILES
        assert (target / "tokenizer.json").read_text() == "tokenizer.json"


def test_writes_into_an_empty_directory_and_draws_a_bar(tmp_path, capsys):
    model, target = model_of(tmp_path), tmp_path / "deep" / "er"
    target.mkdir(parents=True)
    assert main(["convert", str(model), str(target)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "Converting weights" in said.err
    assert f"{target}: 21 tensors, 0.00 GB read, written as orbax" in said.err.replace("\n", "")


@pytest.mark.parametrize("kind", ["link to an empty directory", "dangling link", "here"])
def test_targets_by_other_names(tmp_path, monkeypatch, kind):
    model, real, target = model_of(tmp_path), tmp_path / "real", tmp_path / "link"
    if kind == "here":
        real.mkdir()
        monkeypatch.chdir(real)
        target = Path()
    else:
        target.symlink_to(real)
        if kind == "link to an empty directory":
            real.mkdir()
    assert convert(model, target) == 0
    assert (real / "config.json").exists()
    assert (tmp_path / "link").is_symlink() == (kind != "here")
    with OrbaxCheckpoint(real) as checkpoint:
        assert checkpoint.shapes


def test_numbers_too_large_for_float16_are_named(tmp_path, capsys):
    model = model_of(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = 70_000.0
    save_file(tensors, model / "model.safetensors")
    assert convert(model, tmp_path / "out", "--dtype", "float16") == 2
    assert "model.norm.weight has numbers that float16 cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_only_begins_like_orbaxs_is_no_checkpoint(tmp_path):
    model = model_of(tmp_path)
    (model / "orbax-of-others").mkdir()
    assert convert(model, tmp_path / "out") == 0


def test_a_target_within_the_source_or_on_a_mount_is_refused(tmp_path, capsys, monkeypatch):
    model = model_of(tmp_path)
    assert convert(model, model / "orbax") == 2
    assert "is in" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    assert convert(model, tmp_path / "out") == 2
    assert "is a mount point: name a directory in it" in capsys.readouterr().err
    assert not (model / "orbax").exists()


def damaged(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def incomplete(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")


REFUSALS = {
    "damaged": (damaged, "Is it truncated"),
    "incomplete": (incomplete, "1 tensors are missing: model.norm.weight"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json"),
    "no model": (lambda model: shutil.rmtree(model), "config.json"),
    "both": (lambda model: (model / "orbax").mkdir(), "weights in two formats"),
    "in the way": (lambda model: (model.parent / "out").touch(), "name another TARGET"),
    "not empty": (lambda model: (model.parent / "out" / "a").mkdir(parents=True), "another TARGET"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(tmp_path, capsys, spoil, message):
    model = model_of(tmp_path)
    spoil(model)
    before = sorted(tmp_path.rglob("*"))
    assert convert(model, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("slora convert: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert convert(model_of(tmp_path), tmp_path / "file" / "out") == 2
    assert "cannot convert" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, capsys, to):
    model = model_of(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    seen = []

    def interrupt(*_: object) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("slora_jax.cli.convert._copy_files", interrupt)
    assert convert(model, tmp_path / "out", "--to", to) == 130
    assert any(name.endswith(".unfinished") for name in seen)
    assert "out" not in seen
    assert sorted(tmp_path.rglob("*")) == before
    assert "interrupted" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from slora_jax.cli import main
from slora_jax.model.checkpoint import Checkpoint
read, count = Checkpoint.read, 0
def read_few(*args):
    global count
    count += 1
    if count == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
Checkpoint.read = read_few
from slora_jax.model import orbax
orbax._GROUP_BYTES = 10_000
main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_what_a_killed_conversion_leaves_does_not_load(tmp_path, capsys, to):
    model = model_of(tmp_path)
    argv = ["convert", "--to", to, str(model), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], capture_output=True)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.*.unfinished")
    assert list(left.iterdir())
    shutil.copyfile(model / "config.json", left / "config.json")  # even if it were whole
    assert convert(left, tmp_path / "again") == 2
    said = capsys.readouterr().err
    assert ("not finished" if to == "orbax" else "truncated") in said


def test_help_needs_no_jax():
    code = (
        "import sys; from slora_jax.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "finally: assert not {'jax', 'transformers', 'orbax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("SOURCE", "TARGET", "--to {orbax,safetensors}", "--dtype"):
        assert text in done.stdout
