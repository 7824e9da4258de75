# SPDX-License-Identifier: Apache-2.0
"""The Orbax format: weights in a directory `orbax`, beside the usual Hugging Face files.

    model/
        config.json, tokenizer.json, ...
        orbax/      what `ocp.save(model / "orbax", tensors)` writes

The tree is a flat dict of the unfused tensors by their Hugging Face names, as
"model.layers.0.self_attn.q_proj.weight": so one checkpoint serves any number of devices, and a
training job in JAX writes it with that one call. `slora convert` stores tensors in chunks of
`_CHUNK_BYTES`, the least that is read: with the single chunk that Orbax makes of a NumPy array by
default, a device would read the whole tensor to take its part.

Every process reads what its own devices hold and waits for no other: Orbax is told that it is
alone. Orbax takes a second to import, so that only what needs it does.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from sharding import TENSOR, Placement, Split
from sharding.specs import sharded_axis
from slora_jax.model.checkpoint import CheckpointError
from slora_jax.model.sources import WeightSource

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

ORBAX = "orbax"  # the directory's name
_CHUNK_BYTES = 1 << 20  # 512 by 1024 of bfloat16: an eighth of 4096 rows or columns has no rest
_GROUP_BYTES = 1 << 29  # written at a time; what a group costs grows with their number
_DTYPES = ("float32", "float16", "bfloat16")
_REMEDY = "Copy or download it again, or convert it again with `slora convert`"


class OrbaxCheckpoint:
    """The tensors of an Orbax checkpoint by name; a context manager, as `Checkpoint` is.

    Opening reads the metadata only. Damaged data is found when it is read.

    Attributes:
        model_dir: the directory that `orbax` is in.
        shapes: the shape of every tensor.

    Raises:
        CheckpointError: unfinished, damaged, or not a flat dict of arrays of floats.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._path = model_dir.absolute() / ORBAX
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        for name, leaf in _read_metadata(self._path).items():
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if shape is None or dtype is None:
                raise CheckpointError(
                    f"{self._path}: '{name}' is not an array. The tree must be one flat dict, of "
                    f"tensors by their Hugging Face names"
                )
            if np.dtype(dtype).name not in _DTYPES and not name.endswith("inv_freq"):
                raise CheckpointError(
                    f"{self._path}: tensor {name} is {np.dtype(dtype).name}, not one of "
                    f"{', '.join(_DTYPES)}: quantised checkpoints are not supported"
                )
            self.shapes[name] = tuple(shape)
            self._dtypes[name] = np.dtype(dtype)

    def __enter__(self) -> "OrbaxCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is kept open."""

    def dtype(self, name: str) -> np.dtype:
        """The type that a tensor is stored in."""
        return self._dtypes[name]

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor in memory, in the type that it is stored in."""
        return math.prod(self.shapes[name]) * self._dtypes[name].itemsize

    def read(self, name: str) -> np.ndarray:
        """Copies a tensor to memory.

        Raises:
            CheckpointError: its data is missing or damaged.
        """
        return self.restore({name: np.ndarray})[name]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal. Holds both."""
        if self.shapes[name] != self.shapes[other]:
            return False
        return np.array_equal(self.read(name), self.read(other))

    def restore(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Reads tensors, all at once.

        Args:
            targets: by name, `np.ndarray`, or the shape, type and sharding of an array. What is
                longer than the tensor is filled up with zeros.

        Raises:
            CheckpointError: some data is missing or damaged.
        """
        from orbax.checkpoint import v1 as ocp

        try:
            with _context():
                return ocp.load(str(self._path), dict(targets))
        except (MemoryError, jax.errors.JaxRuntimeError):  # of the devices
            raise
        except Exception as error:  # Orbax and TensorStore raise nearly every class there is
            names = ", ".join(list(targets)[:3]) + (", …" if len(targets) > 3 else "")
            raise CheckpointError(
                f"cannot read {names} from {self._path}: {_shorten(error)}. {_REMEDY}"
            ) from error


def read_shards(
    checkpoint: OrbaxCheckpoint,
    sources: Mapping[str, WeightSource],
    dtype: DTypeLike,
    placement: Placement,
) -> Iterator[tuple[str, Array]]:
    """The arrays of `LlamaWeights` by their paths, a layer at a time, each device reading its part.

    A layer's tensors and what is fused from them are on the devices together, and the host holds
    two layers at most.

    Raises:
        CheckpointError: some data is missing or damaged.
    """

    @cache  # one compiled program for each shape, not for each array
    def fuse(spec: PartitionSpec):
        def concatenate(*parts: Array) -> Array:
            return jnp.concatenate(parts)

        if placement.size == 1:
            return jax.jit(concatenate, out_shardings=placement.sharding())
        options = {"mesh": placement.mesh, "in_specs": spec, "out_specs": spec}
        local = jax.shard_map(concatenate, **options, check_vma=False)
        return jax.jit(local, out_shardings=placement.sharding(spec))

    in_flight: list[Array] = []
    for _, layer in groupby(sources.items(), lambda item: _layer(item[0])):
        group = dict(layer)
        targets = {
            name: _target(shape, split, source.spec, dtype, placement)
            for source in group.values()
            for name, shape, split in _tensors(source)
        }
        tensors = checkpoint.restore(targets)
        # Reading the next layer overlaps with copying this one to the devices.
        jax.block_until_ready(in_flight)
        in_flight = []
        for path, source in group.items():
            parts = [
                _dealt_out(tensors.pop(name), split, source.spec, placement)
                for name, _, split in _tensors(source)
            ]
            array = fuse(source.spec)(*parts) if len(parts) > 1 else parts[0]
            in_flight.append(array)
            yield path, array
    jax.block_until_ready(in_flight)


def write_orbax(model_dir: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes `model_dir/orbax`, holding `_GROUP_BYTES` or one tensor at a time.

    `orbax` is there once all of it is. Until then there is `orbax.partial_save`, which is refused.

    Args:
        model_dir: a directory without one.
        tensors: by their Hugging Face names, each once.

    Raises:
        RuntimeError: this is one of several processes.
    """
    from orbax.checkpoint import v1 as ocp

    if jax.process_count() > 1:
        raise RuntimeError("an Orbax checkpoint is written by one process: convert it beforehand")
    path = str(model_dir.absolute() / ORBAX)
    group: dict[str, np.ndarray] = {}
    with _context():
        for name, tensor in tensors:
            if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > _GROUP_BYTES:
                ocp.partial.save(path, group)
                group = {}
            group[name] = tensor
        ocp.partial.save(path, group)
        ocp.partial.finalize(path)


def _context() -> "ocp.Context":
    """Orbax's settings, for reading and for writing, without barriers between processes."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    context.pytree.loading.partial_load = True
    context.array.loading.enable_padding_and_truncation = True
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False  # nobody writes to them
    return context


def _read_metadata(path: Path) -> Mapping[str, Any]:
    """The tree, with the shape and type of every tensor."""
    from orbax.checkpoint import v1 as ocp

    if unfinished := [p.name for p in path.parent.glob(f"{path.name}.*") if p.is_dir()]:
        raise CheckpointError(
            f"{path.parent} holds {', '.join(unfinished)}, a checkpoint that was not finished: "
            f"delete it. {_REMEDY}"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing. {_REMEDY}")
    try:
        with _context():
            metadata = ocp.metadata(str(path))
    except Exception as error:  # as above
        raise CheckpointError(
            f"{path} is no Orbax checkpoint, or a damaged one: {_shorten(error)}. {_REMEDY}"
        ) from error
    if metadata.commit_timestamp_nsecs is None:
        raise CheckpointError(
            f"{path} is incomplete: its _CHECKPOINT_METADATA does not say that it was finished. "
            f"{_REMEDY}"
        )
    tree = metadata.metadata
    if not isinstance(tree, Mapping) or not tree:
        raise CheckpointError(f"{path}: its files are missing or damaged. {_REMEDY}")
    return tree


def _layer(path: str) -> str:
    return ".".join(path.split(".")[:2]) if path.startswith("layers.") else path


def _tensors(source: WeightSource) -> Iterator[tuple[str, tuple[int, ...], Split | None]]:
    splits = source.splits or (None,) * len(source.names)
    return zip(source.names, source.shapes, splits, strict=True)


def _target(
    shape: tuple[int, ...],
    split: Split | None,
    spec: PartitionSpec,
    dtype: DTypeLike,
    placement: Placement,
) -> jax.ShapeDtypeStruct:
    """What Orbax is asked for, so that every device reads its block of a tensor.

    Orbax cuts an array into even blocks, one after another, and pads the end. So are all splits:
    the first device's `Split.once` is the first block, the others are past the end.
    """
    copies = _copies(split)
    if copies == 1:
        return placement.shape(_block_shape(shape, split, spec), spec, dtype)
    assert split is not None
    devices = placement.mesh.devices.reshape(split.size // split.width, copies)
    mesh = Mesh(devices, (TENSOR, "copy"), axis_types=(AxisType.Auto,) * 2)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _dealt_out(
    array: Array, split: Split | None, spec: PartitionSpec, placement: Placement
) -> Array:
    """What was read, as an array on the mesh of which every device has its block; moves nothing."""
    if _copies(split) == 1:
        return array
    blocks = [shard.data for shard in array.addressable_shards]
    whole = placement.whole(blocks[0].shape, spec)
    return jax.make_array_from_single_device_arrays(whole, placement.sharding(spec), blocks)


def _copies(split: Split | None) -> int:
    """How many devices hold the same block: more than 1 with fewer heads than devices."""
    return 1 if split is None else split.starts.count(0)


def _block_shape(
    shape: tuple[int, ...], split: Split | None, spec: PartitionSpec
) -> tuple[int, ...]:
    axis = sharded_axis(spec)
    if split is None or axis is None:
        return shape
    return (*shape[:axis], split.width, *shape[axis + 1 :])


def _shorten(error: BaseException, limit: int = 300) -> str:
    """What an error is due to, in a line, without TensorStore's account of all its settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}".split("\n")[0].split(" [tensorstore_spec")[0]
    return text.rstrip(".") if len(text) <= limit else f"{text[:limit]}…"
