# SPDX-License-Identifier: Apache-2.0
"""Reads a PEFT LoRA directory into NumPy arrays, or says exactly why it cannot be served.

The tensors' names decide which projections are adapted, `adapter_config.json` with what scale. What
is not understood is refused, so that nobody gets the base's output under an adapter's name.
"""

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.files import Deadline, read_file
from slora_jax.adapters.peft_config import LoraConfig
from slora_jax.adapters.peft_tensors import MOST_HEADER, AdapterTensors, Tensor, module_paths
from slora_jax.config import ModelConfig

type Signature = tuple[tuple[int, ...], ...]
"""Of an adapter's files: see `signature_of`."""

CONFIG_FILE = "adapter_config.json"
_TENSOR_FILE = "adapter_model.safetensors"
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
_MOST_CONFIG = 1 << 20  # bytes; PEFT writes about 1 kB, and 60 for each module with its own rank

_SAVE_AGAIN = "Give a directory that PEFT's save_pretrained wrote"
# Without single quotes, so that a shell's quoting leaves it readable.
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    'tensors = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
    "save_file({k: v.contiguous().clone() for k, v in tensors.items()}, sys.argv[2])"
)


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """One adapted projection: `y += scale * (x Aᵀ) Bᵀ`, where an embedding's x is one-hot.

    Attributes:
        a: `[R, I]`, float32, float16 or bfloat16 as stored; read-only.
        b: `[O, R]`, likewise.
        scale: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`, both of this module.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter as it was trained.

    Attributes:
        name: what requests call it.
        path: the directory it was read from.
        layers: of each of the base's layers, module name -> pair; empty where nothing is adapted.
        outer: the same of `embed_tokens` and `lm_head`.
        digest: SHA-256 of what was read: its identity. An adapter overwritten in place is another
            one, a copy elsewhere the same.
    """

    name: str
    path: Path
    layers: tuple[Mapping[str, LoraPair], ...]
    outer: Mapping[str, LoraPair]
    digest: str

    @property
    def max_rank(self) -> int:
        return max(pair.rank for pairs in (*self.layers, self.outer) for pair in pairs.values())


def read_adapter(
    path: str | Path,
    config: ModelConfig,
    *,
    name: str | None = None,
    max_rank: int | None = None,
    base_weight: Callable[[str], np.ndarray] | None = None,
    time_limit_s: float = math.inf,
) -> Adapter:
    """Reads the directory that PEFT's `save_pretrained` wrote.

    Args:
        path: the directory.
        config: the base to be served with.
        name: the adapter's name; None for the directory's.
        max_rank: the engine's `max_lora_rank`; None for no limit.
        base_weight: gives the base's `embed_tokens` or `lm_head`, `[V, E]`. PEFT saves copies of
            both beside LoRA on either; without this, or if they differ, they are refused. A copy
            that is the base's but for its narrower dtype is accepted, and the base served, where
            PEFT would serve the rounded copy.
        time_limit_s: after which reading is given up.

    Raises:
        AdapterError: damaged, not for this base, or not to be served faithfully.
        AdapterUnavailable: its files cannot be read now, or not in time.
    """
    directory, deadline = Path(path), Deadline(time_limit_s)
    if not directory.is_dir():
        raise AdapterError(
            f"{directory}: no such directory. Give one on this machine that holds {CONFIG_FILE}"
        )
    config_file, tensor_file = files_of(directory)
    try:
        config_content = read_file(config_file, _MOST_CONFIG, _SAVE_AGAIN, deadline)
    except FileNotFoundError:
        raise AdapterError(f"{config_file}: no such file. {_SAVE_AGAIN}") from None
    lora = LoraConfig.parse(config_content, config_file)
    try:
        tensor_content = read_file(tensor_file, *_most_tensors(config, max_rank), deadline)
    except FileNotFoundError:
        remedy = _how_to_get_tensors(directory)
        raise AdapterError(f"{tensor_file}: no such file. {remedy}") from None
    tensors = AdapterTensors.parse(tensor_content, config, tensor_file)
    _check_base_copies(tensors, base_weight)
    deadline.check(tensor_file)
    layers, outer = _pairs(tensors, lora, config, max_rank, deadline)
    if lora.tied and config.tie_word_embeddings:
        _check_tied(outer, tensor_file)
    return Adapter(
        name=name or directory.absolute().name,
        path=directory,
        layers=layers,
        outer=outer,
        digest=_digest(config_content, tensor_content),
    )


def files_of(directory: Path) -> tuple[Path, Path]:
    """The two files of an adapter: its configuration and its tensors."""
    return directory / CONFIG_FILE, directory / _TENSOR_FILE


def signature_of(directory: Path) -> Signature:
    """What changes when one of the adapter's files is written or replaced, for a quick look.

    So it does when a link on the way to them leads somewhere else.
    """
    found = []
    for file in files_of(directory):
        try:
            stat = file.stat()
            times = stat.st_mtime_ns, stat.st_ctime_ns
            found.append((stat.st_dev, stat.st_ino, stat.st_size, *times))
        except OSError:
            found.append(())  # reading it will say what is wrong
    return tuple(found)


def _most_tensors(config: ModelConfig, max_rank: int | None) -> tuple[int, str]:
    """Bytes that a file of tensors may have, and what to do about a larger one.

    As many as float64 takes: what is a little too large is refused for a reason of its own.
    """
    shapes = [config.projection_shape(place.module) for place in module_paths(config).values()]
    rank = max(map(max, shapes)) if max_rank is None else max_rank
    factors = sum(inputs + outputs for inputs, outputs in shapes) * rank
    base_copies = 2 * config.vocab_size * config.hidden_size
    remedy = (
        "Serve the adapter with the base it was trained on"
        if max_rank is None
        else f"An adapter of this base has less, up to max_lora_rank = {max_rank}: serve it with "
        "the base it was trained on, or raise max_lora_rank"
    )
    return 8 * (factors + base_copies) + MOST_HEADER, remedy


def _how_to_get_tensors(directory: Path) -> str:
    """What to do when there is no safetensors file; pickles run code, so they are never read."""
    for pickle in _PICKLE_FILES:
        if (directory / pickle).exists():
            paths = [str(directory / pickle), str(directory / _TENSOR_FILE)]
            command = shlex.join(["python", "-c", _CONVERT, *paths])
            return f"Convert {pickle} with: {command}"
    return "Save the adapter with save_pretrained, which writes it"


def _pairs(
    tensors: AdapterTensors,
    lora: LoraConfig,
    config: ModelConfig,
    max_rank: int | None,
    deadline: Deadline,
) -> tuple[tuple[dict[str, LoraPair], ...], dict[str, LoraPair]]:
    """The pairs of each layer, and those outside the layers."""
    layers = tuple({} for _ in range(config.num_hidden_layers))
    outer = {}
    for module_path, (layer, module) in module_paths(config).items():
        if module_path not in tensors.factors:
            continue
        deadline.check(tensors.file)
        a, b = _matching_factors(module_path, config.projection_shape(module), tensors, lora)
        rank = a.shape[0]
        if max_rank is not None and rank > max_rank:
            raise AdapterError(
                f"{tensors.file}: {module_path} has rank {rank}, more than max_lora_rank = "
                f"{max_rank}. Start the engine with max_lora_rank = {rank} or more"
            )
        pairs = outer if layer is None else layers[layer]
        pairs[module] = LoraPair(a=a, b=b, scale=lora.scale_of(module_path))
    return layers, outer


def _check_tied(outer: Mapping[str, LoraPair], file: Path) -> None:
    """Refuses a tied pair that is stored for one use only, or differently for both.

    PEFT then decides by rules of its own which one both uses get; as stored, both are as trained.
    """
    if not outer:
        return
    embed, head = outer.get("embed_tokens"), outer.get("lm_head")
    if embed and head and np.array_equal(embed.a, head.b.T) and np.array_equal(embed.b, head.a.T):
        return
    raise AdapterError(
        f"{file}: with ensure_weight_tying, embed_tokens and lm_head must hold the same pair of "
        "matrices, transposed. Save the adapter again, or train with ensure_weight_tying=False"
    )


def _matching_factors(
    module_path: str, shape: tuple[int, int], tensors: AdapterTensors, lora: LoraConfig
) -> tuple[np.ndarray, np.ndarray]:
    """A `[R, I]` and B `[O, R]` of a module, checked against the base, config and each other.

    Args:
        module_path: such as `model.layers.0.mlp.up_proj`; in `tensors`.
        shape: `(I, O)` of the base's projection.
        tensors: has one factor of the module, or both.
        lora: says what R should be.
    """
    inputs, outputs = shape
    factors, file = tensors.factors[module_path], tensors.file
    if len(factors) < 2:
        [(present, tensor)] = factors.items()
        missing = {"A": "B", "B": "A"}[present]
        raise AdapterError(
            f"{file}: {tensor.key} has no {missing} beside it. Save the adapter again"
        )
    a, b = factors["A"], factors["B"]
    expected_rank, field = lora.rank_of(module_path)
    # A rank other than expected is told as that, not as two wrong shapes.
    rank = a.array.shape[0] if a.array.ndim == 2 and a.array.size else expected_rank
    _check_shape(a, (rank, inputs), file)
    _check_shape(b, (outputs, rank), file)
    if rank != expected_rank:
        raise AdapterError(
            f"{file}: {a.key} has rank {rank}, but {field} = {expected_rank} in {lora.file}. "
            "Keep the two files of one save together"
        )
    for tensor in (a, b):
        if not np.isfinite(tensor.array).all():
            raise AdapterError(
                f"{file}: {tensor.key} holds NaN or infinity. "
                "Use a checkpoint from before training diverged"
            )
    return a.array, b.array


def _check_shape(tensor: Tensor, expected: tuple[int, int], file: Path) -> None:
    found = tensor.array.shape
    if found == expected:
        return
    if tensor.array.size == 0 or len(found) < 2:
        remedy = "Its shards were not gathered (ZeRO-3, FSDP): gather them before save_pretrained"
    else:
        remedy = "Serve the adapter with the base it was trained on"
    raise AdapterError(
        f"{file}: {tensor.key} has the shape {list(found)}, expected {list(expected)}. {remedy}"
    )


def _check_base_copies(
    tensors: AdapterTensors, base_weight: Callable[[str], np.ndarray] | None
) -> None:
    """Refuses copies of the base's weights that might not be the base's weights.

    LoRA freezes what it adapts, but the vocabulary may have been resized or the base another.
    """
    for module, (key, copy) in tensors.base_copies:
        if base_weight is None:
            reason = f"a copy of the base's {module}, which may differ from the one being served"
        elif not _equal_when_rounded(copy, base_weight(module)):
            reason = f"a copy of {module} that differs from that of the base being served"
        else:
            continue
        raise AdapterError(
            f"{tensors.file}: {key} is {reason}. If the vocabulary was not resized and {module} "
            "not trained in full, save with save_pretrained(..., save_embedding_layers=False)"
        )


def _equal_when_rounded(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices are equal, or one is the other in a narrower dtype."""
    with np.errstate(over="ignore"):
        return np.array_equal(a.astype(b.dtype), b) or np.array_equal(a, b.astype(a.dtype))


def _digest(config_content: bytes, tensor_content: bytes) -> str:
    """SHA-256 of both files; the first one's length keeps `("ab", "c")` and `("a", "bc")` apart."""
    digest = hashlib.sha256(len(config_content).to_bytes(8, "little"))
    digest.update(config_content)
    digest.update(tensor_content)
    return digest.hexdigest()
