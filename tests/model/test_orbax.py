# SPDX-License-Identifier: Apache-2.0
"""An Orbax checkpoint gives every device what safetensors give it, or is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from sharding import Placement, tensor_mesh
from slora_jax.config import ModelConfig
from slora_jax.model import orbax
from slora_jax.model.checkpoint import Checkpoint, CheckpointError
from slora_jax.model.formats import open_checkpoint
from slora_jax.model.loader import load_weights
from slora_jax.model.orbax import OrbaxCheckpoint, write_orbax
from slora_jax.model.shards import ModelShards
from slora_jax.model.weights import LlamaWeights
from tests.model.orbax_damage import DAMAGE
from tests.sharding.models import GQA, MHA, write_model

FEW_HEADS = ModelConfig(  # one key/value head, and biases of all projections
    **{name: getattr(MHA, name) for name in MHA.__dataclass_fields__} | {"num_key_value_heads": 1}
)
CONFIGS = {"padding, biases": MHA, "tied, 2 kv heads": GQA, "biases, 1 kv head": FEW_HEADS}
ROOT = Path(__file__).parents[2]
Pair = tuple[ModelConfig, Path, Path]


def write(model_dir: Path, tensors: dict[str, np.ndarray]) -> Path:
    model_dir.mkdir(exist_ok=True)
    write_orbax(model_dir, tensors.items())
    return model_dir


def load(model_dir: Path, config: ModelConfig, size: int = 1, dtype=jnp.float32) -> LlamaWeights:
    model, placement = ModelShards(config, size), Placement(tensor_mesh(size))
    return load_weights(model_dir, model, dtype, placement, progress=False)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    """The same model in both formats."""
    root = tmp_path_factory.mktemp("models")
    hf = write_model(root / "hf", request.param)
    return request.param, hf, write(root / "orbax", load_file(hf / "model.safetensors"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    hf = write_model(root / "hf", GQA)
    return write(root / "orbax", load_file(hf / "model.safetensors"))


@pytest.fixture
def model(written, tmp_path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(written, tmp_path / "model")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_device_holds_what_safetensors_give_it(pair: Pair, size):
    config, hf, converted = pair
    expected, found = load(hf, config, size), load(converted, config, size)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        for mine, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert mine.device == other.device
            np.testing.assert_array_equal(mine.data, other.data)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts_as_safetensors_do(tmp_path, stored):
    tensors = load_file(write_model(tmp_path / "hf", GQA) / "model.safetensors")
    tensors = {name: (1000 * tensor).astype(stored) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    write(tmp_path / "orbax", tensors)
    with OrbaxCheckpoint(tmp_path / "orbax") as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.dtype(name) == tensor.dtype
            assert checkpoint.num_bytes(name) == tensor.nbytes
            assert checkpoint.read(name).tobytes() == tensor.tobytes()
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        both = [jax.tree.leaves(load(tmp_path / d, GQA, dtype=dtype)) for d in ("hf", "orbax")]
        for expected, found in zip(*both, strict=True):
            assert np.asarray(expected).tobytes() == np.asarray(found).tobytes()


def test_a_flat_dict_that_a_training_job_saves_is_loaded(tmp_path):
    tensors = load_file(write_model(tmp_path / "hf", MHA) / "model.safetensors")
    mesh = tensor_mesh(4)
    where = jax.NamedSharding(mesh, jax.P(None))
    ocp.save(tmp_path / "job" / "orbax", {k: jax.device_put(v, where) for k, v in tensors.items()})
    expected, found = (load(tmp_path / name, MHA, 2) for name in ("hf", "job"))
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    with open_checkpoint(tmp_path / "job") as checkpoint:
        np.testing.assert_array_equal(
            checkpoint.read("lm_head.weight"), tensors["lm_head.weight"], strict=True
        )


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/")
    (found,) = [m for m in metrics if m["name"].endswith("/bytes_read")]
    return sum(value["value"] for value in found["values"])


def test_a_device_reads_its_part(tmp_path, monkeypatch):
    """Of 8 devices' blocks of rows and of columns, one is read: that much of the file and no more.

    All of them together are not measured: TensorStore merges reads that a process has in flight.
    """
    rng = np.random.default_rng(0)
    tensor = rng.integers(0, 2**32, (1024, 1024), np.uint32).view(np.float32)  # incompressible
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 1 << 16)  # 128 by 128
    write(tmp_path, {"a": tensor})
    placement = Placement(tensor_mesh(1))
    for axis in range(2):
        shape = [1024, 1024]
        shape[axis] //= 8
        with OrbaxCheckpoint(tmp_path) as checkpoint:
            before = bytes_read()
            target = placement.shape(shape, jax.P(), jnp.float32)
            found = checkpoint.restore({"a": target})["a"]
            read = (bytes_read() - before) / tensor.nbytes
        assert np.asarray(found).tobytes() == tensor[tuple(map(slice, shape))].tobytes()
        assert 1 / 8 <= read < 1 / 8 + 0.02


def test_groups_are_written_one_by_one(tmp_path, monkeypatch):
    tensors = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    alive = []

    def one_by_one() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            alive.append((tmp_path / "orbax").exists())
            yield name, tensor

    monkeypatch.setattr(orbax, "_GROUP_BYTES", 128)  # two tensors
    write_orbax(tmp_path, one_by_one())
    assert not any(alive)
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]
    with OrbaxCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.shapes == dict.fromkeys(tensors, (4, 4))
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name), tensor)
        assert checkpoint.same("t1", "t1")
        assert not checkpoint.same("t1", "t2")


def test_a_directory_of_both_formats_is_refused(model):
    save_file({"a": np.ones(1)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two formats, .*: model.safetensors, orbax\. Keep"):
        open_checkpoint(model)


def test_safetensors_alone_are_opened_as_before(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)


MISSING = "its files are missing or damaged"
NONE = "no Orbax checkpoint, or a damaged one"
REFUSALS = {
    "interrupted save": "orbax.orbax-checkpoint-tmp-1, a checkpoint that was not finished",
    "interrupted conversion": "orbax.partial_save, a checkpoint that was not finished: delete it",
    "no weights at all": "holds no weights: neither .* nor a directory orbax",
    "empty": NONE,
    "not committed": "is incomplete",
    "no checkpoint metadata": NONE,
    "half checkpoint metadata": "is incomplete",
    "no state": NONE,
    "no tree": NONE,
    "half a tree": MISSING,
    "no manifest": MISSING,
    "half a manifest": MISSING,
    "no index": MISSING,
    "half an index": MISSING,
    "no data": "cannot read model",
    "empty data": "cannot read model",
    "half the data": "cannot read model",
}


@pytest.fixture(scope="module")
def refusals(written, tmp_path_factory) -> dict[str, str]:
    """What loading a checkpoint says, by the damage done to it."""
    command = [sys.executable, "-m", "tests.model.orbax_damage", written]
    command.append(tmp_path_factory.mktemp("damaged"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("damage", "message"), REFUSALS.items(), ids=REFUSALS)
def test_refuses_what_is_damaged_or_incomplete(refusals, damage, message):
    said = refusals[damage]
    assert re.search(message, said)
    assert "MODEL" in said
    assert damage == "no weights at all" or "convert it again" in said
    assert len(said) < 700


def test_all_damage_is_refused(refusals):
    assert list(refusals)[: len(DAMAGE)] == list(DAMAGE) == list(REFUSALS)


def test_a_file_cut_anywhere_is_refused_unless_nothing_that_is_needed_was_cut_off(refusals):
    """Orbax leaves some files behind that it has merged."""
    outcomes = [outcome for name, outcome in refusals.items() if name not in DAMAGE]
    assert set(outcomes) <= {"refused", "whole"}
    assert outcomes.count("refused") >= 4


TREES = {
    "nested": ({"model": {"norm": np.ones(3, np.float32)}}, "'model' is not an array.*flat dict"),
    "no array": ({"model.norm.weight": 3}, "'model.norm.weight' is not an array"),
    "integers": ({"a": np.ones(3, np.int8)}, "tensor a is int8, not one of .*quantised"),
    "doubles": ({"a": np.ones(3)}, "tensor a is float64, not one of float32"),
}


@pytest.mark.parametrize(("tree", "message"), TREES.values(), ids=TREES)
def test_refuses_other_trees(tmp_path, tree, message):
    ocp.save(tmp_path / "orbax", tree)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_refuses_missing_extra_and_misshapen_tensors(tmp_path, written):
    with OrbaxCheckpoint(written) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    norm, head = "model.norm.weight", "lm_head.weight"
    cases = [
        ({k: v for k, v in tensors.items() if k != norm}, f"1 tensors are missing: {norm}"),
        (tensors | {norm: np.ones(31, np.float32)}, rf"{norm} should be \[32\] and is \[31\]"),
        (tensors | {"more": np.ones(1, np.float32)}, "1 tensors have no place .*: more"),
        (tensors | {head: np.ones((99, 32), np.float32)}, f"{head} differs from"),
    ]
    for number, (content, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message):
            load(write(tmp_path / str(number), content), GQA)
    same = write(tmp_path / "same", tensors | {head: tensors["model.embed_tokens.weight"]})
    assert load(same, GQA).lm_head is None
