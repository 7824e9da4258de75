# SPDX-License-Identifier: Apache-2.0
"""Writes a directory of safetensors files as Hugging Face does, holding one tensor at a time.

The library's `save_file` takes a whole file's tensors at once. The format is simple: the length of
a header, the header as JSON, and the tensors' bytes one after another.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

_FILE_BYTES = 5 * 10**9  # at most, but for a tensor that is larger, as in transformers
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8  # of the tensors' bytes in the file

Kinds = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shapes and types of tensors by name


def write_safetensors(model_dir: Path, tensors: Kinds, read: Callable[[str], np.ndarray]) -> None:
    """Writes `model.safetensors`, or several files and, last, their index.

    Args:
        model_dir: a directory without weights.
        tensors: what to write, in order.
        read: gives a tensor, of this shape and type; called once for each.
    """
    files = _deal_out(tensors)
    if len(files) == 1:
        _write_file(model_dir / "model.safetensors", files[0], read)
        return
    weight_map = {}
    for number, content in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(model_dir / name, content, read)
        weight_map |= dict.fromkeys(content, name)
    total = sum(_num_bytes(*kind) for kind in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (model_dir / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _deal_out(tensors: Kinds) -> Sequence[Kinds]:
    files, size = [{}], 0
    for name, kind in tensors.items():
        if files[-1] and size + _num_bytes(*kind) > _FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = kind
        size += _num_bytes(*kind)
    return files


def _write_file(path: Path, tensors: Kinds, read: Callable[[str], np.ndarray]) -> None:
    # The wider types first: so every tensor starts at a multiple of its items' size.
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for a format
    for name in order:
        (shape, dtype), start = tensors[name], end
        end += _num_bytes(shape, dtype)
        kind = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [start, end]}
        header[name] = kind
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == tensors[name]
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
