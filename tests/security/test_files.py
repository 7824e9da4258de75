# SPDX-License-Identifier: Apache-2.0
"""Directories that hold anything but an adapter: refused with the reason, at once or in time."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save

from slora_jax.adapters.errors import AdapterError, AdapterUnavailable
from slora_jax.adapters.files import Deadline, read_file
from slora_jax.adapters.peft import read_adapter
from tests.adapters.make import BASE, edit_config, write_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def refusal(directory: Path, **options) -> str:
    with pytest.raises(AdapterError) as error:
        read_adapter(directory, BASE, **{"max_rank": 64} | options)
    return str(error.value)


def bind(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(file))  # a socket's name may have a hundred characters


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "FIFO"),
        (os.mkdir, "directory"),
        (bind, "socket"),
        (lambda file: os.symlink("/dev/zero", file), "device"),
    ],
)
def test_what_is_no_file(tmp_path: Path, file: str, make: Callable, kind: str, monkeypatch):
    """None of them is opened: a FIFO waits for a writer, a device never ends."""
    write_adapter(tmp_path, BASE)
    (tmp_path / file).unlink()
    monkeypatch.chdir(tmp_path)
    make(tmp_path / file)
    assert f"{tmp_path / file}: is a {kind}, not a file" in refusal(tmp_path)


def test_a_fifo_that_takes_the_place_of_a_file(tmp_path: Path, monkeypatch):
    """Between the look at it and the opening."""
    file = write_adapter(tmp_path, BASE) / TENSORS
    look = os.stat

    def look_and_replace(path, **options):
        found = look(path, **options)
        if path == file:
            file.unlink()
            os.mkfifo(file)
        return found

    monkeypatch.setattr(os, "stat", look_and_replace)
    with pytest.raises(AdapterError, match="is a FIFO"):
        read_file(file, 1 << 20, "", Deadline(9))


def test_sizes_have_limits(tmp_path: Path):
    write_adapter(tmp_path, BASE)
    os.truncate(tmp_path / TENSORS, 3 << 40)  # it takes no room on the disk
    message = refusal(tmp_path)
    assert f"has {3 << 40} bytes, more than" in message
    assert "max_lora_rank = 64" in message
    assert "more than" in refusal(tmp_path, max_rank=None)
    os.truncate(tmp_path / CONFIG, 1 << 40)
    assert f"{tmp_path / CONFIG}: has {1 << 40} bytes" in refusal(tmp_path)


def test_what_any_served_adapter_takes_is_within_the_limit(tmp_path: Path):
    modules = [*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    modules += ["embed_tokens", "lm_head"]
    write_adapter(tmp_path, BASE, rank=64, modules=modules)
    assert read_adapter(tmp_path, BASE, max_rank=64).max_rank == 64
    write_adapter(tmp_path, BASE, rank=96, modules=modules)
    assert "rank 96, more than max_lora_rank = 64" in refusal(tmp_path)


def test_files_that_grow_or_have_no_size(tmp_path: Path):
    with pytest.raises(AdapterError, match="more than 9 bytes"):
        read_file(Path("/proc/self/environ"), 9, "", Deadline(9))
    assert read_file(Path("/proc/self/stat"), 1 << 20, "", Deadline(9))


def test_a_file_may_be_as_large_as_is_allowed(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert read_file(tmp_path / "file", 3, "", Deadline(9)) == b"abc"


def test_time_has_a_limit(tmp_path: Path):
    file = write_adapter(tmp_path, BASE) / TENSORS
    with pytest.raises(AdapterUnavailable, match="not read within -1 s"):
        read_file(file, 1 << 30, "", Deadline(-1))
    with pytest.raises(AdapterUnavailable, match=r"not read within 0 s.*lora_load_timeout_s"):
        read_adapter(tmp_path, BASE, time_limit_s=0)


def test_what_cannot_be_read_now_is_unavailable(tmp_path: Path, monkeypatch):
    file = write_adapter(tmp_path, BASE) / TENSORS

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        read_file(file, 1 << 30, "", Deadline(9))


def header(fields: dict, data: int = 0) -> bytes:
    encoded = json.dumps(fields).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(data)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
F32 = {"dtype": "F32", "shape": [8, 32], "data_offsets": [0, 1024]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a whole safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        (header({"x" * (9 << 20): F32}), "its header has"),
        (header({KEY + ".lora_A" * 10_000: F32}, 1024), "longer than a tensor's name may be"),
        (header({KEY: F32 | {"shape": [1] * 70, "data_offsets": [0, 4]}}, 4), "no matrix"),
        (header({KEY: F32 | {"shape": [0] * 70, "data_offsets": [0, 0]}}), "no matrix"),
        (header({KEY: F32 | {"shape": [2**62, 2]}}, 1024), "not a whole safetensors file"),
        (header({KEY: F32 | {"data_offsets": [0, 2**62]}}, 1024), "not a whole safetensors file"),
        (header({KEY: F32 | {"shape": []}}, 4), "not a whole safetensors file"),
        (header({KEY: F32, KEY + "2": F32}, 1024), "not a whole safetensors file"),
        (save({}), "no LoRA matrices"),
    ],
)
def test_headers(tmp_path: Path, content: bytes, part: str):
    (write_adapter(tmp_path, BASE) / TENSORS).write_bytes(content)
    began = time.process_time()
    assert part in refusal(tmp_path, max_rank=None if len(content) > 1 << 20 else 64)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("field", ["peft_type", "r", "use_dora", "rank_pattern", "unknown"])
def test_no_message_repeats_a_file(tmp_path: Path, field: str):
    edit_config(write_adapter(tmp_path, BASE), **{field: "x" * 10**6})
    message = refusal(tmp_path)
    assert len(message) < 5000
    assert field in message
    assert str(tmp_path) in message


def test_numbers_and_depths_of_json(tmp_path: Path):
    for content in ("[" * 10**6, '{"r":' + "9" * 10**6 + "}", '{"a":' * 10**5):
        (write_adapter(tmp_path, BASE) / CONFIG).write_text(content)
        assert "not valid JSON" in refusal(tmp_path)


def test_a_read_that_hangs_leaves_no_lock(tmp_path: Path):
    """Two reads of one directory: the first one's file hangs, the second finds it mended."""
    write_adapter(tmp_path, BASE)
    (tmp_path / CONFIG).rename(tmp_path / "kept")
    os.mkfifo(tmp_path / CONFIG)
    refused = threading.Thread(target=refusal, args=(tmp_path,), daemon=True)
    refused.start()
    refused.join(10)
    assert not refused.is_alive()
    (tmp_path / "kept").replace(tmp_path / CONFIG)
    assert read_adapter(tmp_path, BASE).max_rank == 8
