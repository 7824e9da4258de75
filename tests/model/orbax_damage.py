# SPDX-License-Identifier: Apache-2.0
"""Damages an Orbax checkpoint in every way and prints as JSON what becomes of loading it.

A process of its own: when one of Orbax's reads fails it leaves the others behind, which complain
on stderr whenever they are found, and pytest would hold that against the test it is in by then.

Run as `python -m tests.model.orbax_damage MODEL EMPTY`: a copy of MODEL's checkpoint, for GQA, is
damaged in the directory EMPTY.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sharding import Placement, tensor_mesh
from slora_jax.model.checkpoint import CheckpointError
from slora_jax.model.loader import load_weights
from slora_jax.model.shards import ModelShards
from slora_jax.model.weights import LlamaWeights
from tests.sharding.models import GQA

Damage = Callable[[Path], None]


def remove(pattern: str) -> Damage:
    def damage(model: Path) -> None:
        for path in list(model.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncate(pattern: str, share: float) -> Damage:
    def damage(model: Path) -> None:
        for path in model.glob(pattern):
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * share)])

    return damage


def rename(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / "orbax").rename(model / name)

    return damage


def uncommit(model: Path) -> None:
    path = model / "orbax" / "_CHECKPOINT_METADATA"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"commit_timestamp_nsecs": None}))


DAMAGE = {
    "interrupted save": rename("orbax.orbax-checkpoint-tmp-1"),
    "interrupted conversion": rename("orbax.partial_save"),
    "no weights at all": remove("orbax"),
    "empty": remove("orbax/*"),
    "not committed": uncommit,
    "no checkpoint metadata": remove("orbax/_CHECKPOINT_METADATA"),
    "half checkpoint metadata": truncate("orbax/_CHECKPOINT_METADATA", 0.5),
    "no state": remove("orbax/state"),
    "no tree": remove("orbax/state/_METADATA"),
    "half a tree": truncate("orbax/state/_METADATA", 0.5),
    "no manifest": remove("orbax/state/manifest.ocdbt"),
    "half a manifest": truncate("orbax/state/manifest.ocdbt", 0.5),
    "no index": remove("orbax/state/d/*"),
    "half an index": truncate("orbax/state/d/*", 0.5),
    "no data": remove("orbax/state/ocdbt.process*"),
    "empty data": truncate("orbax/state/ocdbt.process*/d/*", 0),
    "half the data": truncate("orbax/state/ocdbt.process*/d/*", 0.5),
}


def main(written: Path, root: Path) -> None:
    assert "orbax" not in sys.modules  # slow to import: who loads safetensors does not wait for it
    expected, messages = load(written), {}
    for number, (name, damage) in enumerate(DAMAGE.items()):
        model = shutil.copytree(written, root / str(number))
        damage(model)
        try:
            load(model)
        except CheckpointError as error:
            messages[name] = str(error).replace(str(model), "MODEL")
    model = root / "cut"
    for file in written.rglob("d/*"):
        for share in (0.3, 0.9):
            shutil.copytree(written, model)
            truncate(str(file.relative_to(written)), share)(model)
            outcome = "refused"
            with suppress(CheckpointError):
                outcome = "whole" if same(load(model), expected) else "half"
            messages[f"{share} of {file.name}"] = outcome
            shutil.rmtree(model)
    print(json.dumps(messages))


def load(model: Path) -> LlamaWeights:
    shards, placement = ModelShards(GQA, 2), Placement(tensor_mesh(2))
    return load_weights(model, shards, jnp.float32, placement, progress=False)


def same(one: LlamaWeights, other: LlamaWeights) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
