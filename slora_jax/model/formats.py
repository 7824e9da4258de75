# SPDX-License-Identifier: Apache-2.0
"""Which format the weights of a directory have."""

from pathlib import Path

from slora_jax.model.checkpoint import Checkpoint, CheckpointError
from slora_jax.model.orbax import ORBAX, OrbaxCheckpoint


def open_checkpoint(model_dir: Path) -> Checkpoint | OrbaxCheckpoint:
    """Opens the weights of a directory; a context manager.

    Both formats have `shapes` and, by name, `dtype`, `num_bytes`, `read` and `same`.

    Raises:
        CheckpointError: there are no weights, there are weights of both formats, which need not
            be the same, or they cannot be opened.
    """
    own = (model_dir / ORBAX, *model_dir.glob(f"{ORBAX}.*"))  # and Orbax's unfinished ones
    orbax = [path for path in own if path.is_dir()]
    safetensors = [*model_dir.glob("*.safetensors"), *model_dir.glob("*.safetensors.index.json")]
    if orbax and safetensors:
        names = ", ".join(sorted(path.name for path in (*orbax, *safetensors))[:5])
        raise CheckpointError(
            f"{model_dir} holds weights in two formats, safetensors and Orbax, which may differ: "
            f"{names}. Keep one of them there"
        )
    return OrbaxCheckpoint(model_dir) if orbax else Checkpoint(model_dir)
