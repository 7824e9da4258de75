# SPDX-License-Identifier: Apache-2.0
"""A directory of safetensors files, read one tensor at a time. Knows nothing of models."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPARED_ROWS = 4096  # of an embedding, at a time


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not that of the model which its config describes."""


class Checkpoint:
    """The tensors of a checkpoint by name; a context manager that closes its files.

    Opening reads only the files' headers, and so finds a missing or truncated file at once.

    Attributes:
        model_dir: the directory.
        shapes: the shape of every tensor.

    Raises:
        CheckpointError: no safetensors, or a file that is missing, damaged or not of floats.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._homes: dict[str, tuple[Path, Any]] = {}
        with ExitStack() as stack:
            for path in _find_files(model_dir):
                self._read_header(path, stack)
            self._files = stack.pop_all()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._homes.clear()
        self._files.close()

    def _read_header(self, path: Path, stack: ExitStack) -> None:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {path}: {error}. Is it truncated, or a Git LFS pointer? "
                f"Download it again"
            ) from error
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            if name in self._homes:
                raise CheckpointError(f"tensor {name} is in {self._homes[name][0]} and in {path}")
            header = file.get_slice(name)
            dtype = header.get_dtype()
            if dtype not in _DTYPES and not name.endswith("inv_freq"):
                raise CheckpointError(
                    f"tensor {name} of {path} is {dtype}, not one of {', '.join(_DTYPES)}: "
                    f"quantised checkpoints are not supported"
                )
            self.shapes[name] = tuple(header.get_shape())
            if dtype in _DTYPES:
                self._dtypes[name] = np.dtype(_DTYPES[dtype])
            self._homes[name] = path, file

    def dtype(self, name: str) -> np.dtype:
        """The type that a weight is stored in."""
        return self._dtypes[name]

    def num_bytes(self, name: str) -> int:
        """Bytes of a weight as it is stored."""
        return math.prod(self.shapes[name]) * self._dtypes[name].itemsize

    def read(self, name: str, *index: slice) -> np.ndarray:
        """Copies a tensor to memory, or of its first axes only what `index` says.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path, file = self._homes[name]
        try:
            return file.get_slice(name)[index or slice(None)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name} of {path}: {error}") from error

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, without holding either as a whole."""
        if self.shapes[name] != self.shapes[other]:
            return False
        rows = self.shapes[name][0]
        blocks = (
            slice(start, min(start + _COMPARED_ROWS, rows))
            for start in range(0, rows, _COMPARED_ROWS)
        )
        return all(
            np.array_equal(self.read(name, block), self.read(other, block)) for block in blocks
        )


def _find_files(model_dir: Path) -> list[Path]:
    """The files of a checkpoint; a single file goes before an index, as in transformers."""
    if (single := model_dir / _SINGLE).is_file():
        return [single]
    if (index := model_dir / _INDEX).is_file():
        return _read_index(index)
    if any(model_dir.glob("*.safetensors")):
        raise CheckpointError(
            f"{model_dir} has safetensors files, but neither {_SINGLE} nor {_INDEX}, which says "
            f"which of them belong to the model"
        )
    if any(found for pattern in ("*.bin", "*.pth", "*.pt") for found in model_dir.glob(pattern)):
        raise CheckpointError(
            f"{model_dir} holds PyTorch pickles, which can run code when read. Convert them once: "
            f"AutoModelForCausalLM.from_pretrained(old).save_pretrained(new, "
            f"safe_serialization=True)"
        )
    raise CheckpointError(
        f"{model_dir} holds no weights: neither {_SINGLE} nor {_INDEX} nor a directory orbax"
    )


def _read_index(index: Path) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index, an object with a 'weight_map': {error!r}"
        ) from error
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(outside)}")
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index} lists {len(files)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing)}. Download them"
        )
    return [index.parent / name for name in files]
