# SPDX-License-Identifier: Apache-2.0
"""How commands start: options, refusals, and what is imported for them."""

import argparse
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from slora_jax.cli import main
from slora_jax.cli.options import add_engine_arguments, engine_options
from slora_jax.config import EngineConfig
from slora_jax.demo import BASE_MODEL, adapter_dirs

UPPER, LEET = (adapter_dirs()[name] for name in ("upper", "leet"))
SMALL = ["--num-pages", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "16"]


def refused(capsys, tmp_path: Path, *options: str) -> str:
    """The one line that a command that cannot start prints."""
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.touch()
    sink.write_text("results of an earlier run")
    argv = ["generate", "--input", str(source), "--output", str(sink), "--model", str(BASE_MODEL)]
    assert main([*argv, *options]) == 2
    assert sink.read_text() == "results of an earlier run"
    message = capsys.readouterr().err
    assert message.startswith("slora generate: error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--lora-modules", f"base={UPPER}"], "'base' has the name of the base model"),
        (["--lora-modules", f"a={UPPER}", f"a={LEET}"], "two adapters are called 'a'"),
        (["--lora-dir", str(UPPER)], "adapter_config.json"),
        (["--lora-dir", str(UPPER / "missing")], "no such directory"),
        (["--lora-modules", "a=/nowhere", *SMALL], "the adapter 'a' is refused: /nowhere"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--num-pages", "1"], "num_pages must be at least 2"),
        (["--input", "/nowhere"], "cannot open /nowhere"),
        (["--output", "in.jsonl"], "the same file"),
    ],
)
def test_what_cannot_start(capsys, tmp_path, monkeypatch, options, wanted):
    monkeypatch.chdir(tmp_path)
    assert wanted in refused(capsys, tmp_path, *options)


def test_all_that_is_refused_is_said_at_once(capsys, tmp_path):
    broken = [shutil.copytree(UPPER, tmp_path / "adapters" / name) for name in ("one", "two")]
    for directory in broken:
        (directory / "adapter_model.safetensors").write_bytes(b"")
    modules = [f"{directory.name}={directory}" for directory in broken]
    message = refused(capsys, tmp_path, "--lora-modules", f"good={UPPER}", *modules, *SMALL)
    for name in ("one", "two"):
        assert f"the adapter '{name}' is refused" in message
    assert "good" not in message


@pytest.mark.parametrize("argv", [[], ["nope"], ["generate"], ["generate", "--lora-modules", "a"]])
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: slora")


def test_options_are_those_of_the_engine():
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    assert engine_options(parser.parse_args([])) == {
        field.name: field.default for field in fields(EngineConfig)
    }
    argv = "--dtype bfloat16 --num-pages 9 --gpu-memory-utilization 0.5 --decode-batch-sizes 1 64"
    options = engine_options(parser.parse_args(argv.split()))
    assert EngineConfig(**options) == EngineConfig(
        dtype="bfloat16", num_pages=9, gpu_memory_utilization=0.5, decode_batch_sizes=(1, 64)
    )


def test_help_needs_no_jax():
    code = (
        "import sys; from slora_jax.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "finally: assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--lora-modules NAME=DIR" in done.stdout
