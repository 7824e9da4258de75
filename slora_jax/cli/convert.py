# SPDX-License-Identifier: Apache-2.0
"""`slora convert`: a base model's weights from safetensors to Orbax, or back.

The result is written beside its place and moved there when it is whole. Its `config.json` comes
last: without one nothing loads.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slora_jax.cli import CommandError

if TYPE_CHECKING:
    from slora_jax.model.checkpoint import Checkpoint
    from slora_jax.model.orbax import OrbaxCheckpoint

_FORMATS = ("orbax", "safetensors")
_DTYPES = ("bfloat16", "float16", "float32")
_CONFIG = "config.json"
_COPIED = {".json", ".jinja", ".md", ".model", ".txt"}  # config, tokenizer, chat template, papers
_INDEX = ".index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slora convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the base model's directory, with safetensors as from Hugging Face, or with orbax/",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="the directory to write, which must be empty if there is one; config, tokenizer and "
        "chat template are copied into it",
    )
    parser.add_argument(
        "--to", choices=_FORMATS, help="format of TARGET (default: the one that SOURCE is not)"
    )
    parser.add_argument(
        "--dtype",
        choices=(*_DTYPES, "keep"),
        default="keep",
        help="what all weights are cast to, as config.json then says (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Converts; where it fails or is interrupted, TARGET stays as it was."""
    import jax  # what needs it is not imported for --help either

    from slora_jax.hf_config import ModelConfigError, read_model_config
    from slora_jax.model.checkpoint import CheckpointError
    from slora_jax.model.formats import open_checkpoint
    from slora_jax.model.shards import ModelShards
    from slora_jax.model.sources import check_tensors, weight_sources

    jax.config.update("jax_platforms", "cpu")  # a device would only lose its memory to this
    # Without links: what a link to an empty directory names is replaced, not the link.
    source, target = Path(args.source), Path(args.target).resolve()
    if target.is_relative_to(source.resolve()):
        raise CommandError(f"{target} is in {source}, whose weights it would add to: name another")
    try:
        config = read_model_config(source)
        weights = weight_sources(ModelShards(config))
        with open_checkpoint(source) as checkpoint:
            check_tensors(checkpoint, weights, tied=config.tie_word_embeddings)
            names = [name for weight in weights.values() for name in weight.names]
            # A tied head that is stored all the same is kept, buffers are not.
            rest = checkpoint.shapes.keys() - set(names)
            names += sorted(name for name in rest if not name.endswith("inv_freq"))
            with _replaced(target) as folder:
                text = _write(checkpoint, names, folder, args)
                _copy_files(source, folder, args.dtype)
    except (CheckpointError, ModelConfigError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot convert {source} to {target}: {error}") from error
    if not args.quiet:
        print(f"{target}: {text}", file=sys.stderr)
    return 0


def _write(
    checkpoint: "Checkpoint | OrbaxCheckpoint",
    names: list[str],
    folder: Path,
    args: argparse.Namespace,
) -> str:
    """Writes the tensors and returns a summary."""
    from slora_jax.model.loader import progress_bar
    from slora_jax.model.orbax import OrbaxCheckpoint, write_orbax
    from slora_jax.model.writer import write_safetensors

    is_orbax = isinstance(checkpoint, OrbaxCheckpoint)
    to = args.to or ("safetensors" if is_orbax else "orbax")
    dtypes = {
        name: checkpoint.dtype(name) if args.dtype == "keep" else np.dtype(args.dtype)
        for name in names
    }
    with progress_bar(enabled=not args.quiet) as bar:
        total = sum(map(checkpoint.num_bytes, names))
        task = bar.add_task("Converting weights", total=total)

        def read(name: str) -> np.ndarray:
            tensor = _cast(checkpoint.read(name), dtypes[name], name)
            bar.advance(task, checkpoint.num_bytes(name))
            return tensor

        if to == "orbax":
            write_orbax(folder, ((name, read(name)) for name in names))
        else:
            kinds = {name: (checkpoint.shapes[name], dtypes[name]) for name in names}
            write_safetensors(folder, kinds, read)
    return f"{len(names)} tensors, {total / 1e9:.2f} GB read, written as {to}"


def _cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # it is looked for below
        cast = tensor.astype(dtype, copy=False)
    if dtype == np.float16 and tensor.dtype != dtype and not np.isfinite(cast).all():
        raise CommandError(f"{name} has numbers that float16 cannot hold: try --dtype bfloat16")
    return cast


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` unless there is an error."""
    if target.is_mount():
        raise CommandError(f"{target} is a mount point: name a directory in it as TARGET")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CommandError(f"{target} exists and is not an empty directory: name another TARGET")
    folder = target.parent / f".{target.name}.{os.getpid()}.unfinished"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_files(source: Path, folder: Path, dtype: str) -> None:
    """Copies what is not weights; `config.json` is last, and says what the weights now are."""
    for path in sorted(source.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and _is_copied(path):
            shutil.copyfile(path, folder / path.name)
    text = (source / _CONFIG).read_text(encoding="utf-8")
    if dtype != "keep":
        config = json.loads(text)
        fields = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
        text = json.dumps(config | dict.fromkeys(fields, dtype), indent=2) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")


def _is_copied(path: Path) -> bool:
    if path.name == _CONFIG or path.name.endswith(_INDEX):
        return False
    return path.suffix in _COPIED or path.stem in ("LICENSE", "NOTICE")
