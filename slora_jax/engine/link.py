# SPDX-License-Identifier: Apache-2.0
"""What the processes of an engine say to each other, as MessagePack.

Nothing that comes in is unpickled: it is one of the messages below, or an error. An array is the
name of its type, its shape and its bytes, which must fit together.
"""

import math
from dataclasses import fields
from typing import Any, Literal

import msgspec
import numpy as np

from slora_jax.cluster import ClusterError, understand
from slora_jax.core import Install
from slora_jax.engine.command import Choice, Counts, PromptLogprobs, StepCommand
from slora_jax.engine.sampler import PenaltyInputs, SamplingInputs
from slora_jax.model.inputs import Bucket
from slora_jax.model.llama import LoraMode

MOST_REPLY_BYTES = 1 << 16  # of a `Reply` or `Failed`
_MOST_ERROR = 4000  # characters of an error


class Read(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Read an adapter's directory and say what is there."""

    number: int
    path: str


class Stage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copy an adapter to the devices and say when it is there."""

    number: int
    adapter_id: str
    path: str


class Drop(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copies that nobody wants any more."""

    numbers: tuple[int, ...]


class Enter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Write a copy into its pages."""

    install: Install
    number: int


class End(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nothing comes after this."""


type Command = Read | Stage | Drop | Enter | StepCommand | End


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What became of a command of this number: the adapter's id, or what is wrong.

    `unavailable`: it may help to wait.
    """

    number: int
    adapter_id: str | None
    error: str | None
    unavailable: bool = False


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A process ends, and why."""

    error: str


# Steps


class _Array(msgspec.Struct, frozen=True, array_like=True):
    dtype: Literal["int32", "float32"]
    shape: tuple[int, ...]
    data: memoryview


class _Step(msgspec.Struct, frozen=True, array_like=True, tag="Step"):
    """A `StepCommand`, whose fields it has in their order."""

    bucket: Bucket
    decode: bool
    lora_mode: LoraMode
    adapted: frozenset[str]
    packed: _Array
    counts: tuple[tuple[int, _Array, _Array], ...]
    slot: _Array
    penalties: tuple[_Array, ...] | None
    banned: _Array | None
    sampling: tuple[_Array, ...] | None
    logprobs: int | None
    prompt_logprobs: tuple[_Array, int] | None


_INT, _FLOAT = "int32", "float32"
_PENALTIES = (_FLOAT, _FLOAT, _FLOAT)  # types of the fields of `PenaltyInputs`
_SAMPLING = (_FLOAT, _INT, _FLOAT, _FLOAT, _INT, _INT)  # and of `SamplingInputs`


def _to_step(command: StepCommand) -> _Step:
    choice, penalties, sampling = command.choice, command.choice.penalties, command.choice.sampling
    prompt = command.prompt_logprobs
    return _Step(
        command.bucket,
        command.decode,
        command.lora_mode,
        command.adapted,
        _to_array(command.packed),
        tuple((one.slot, _to_array(one.output), _to_array(one.prompt)) for one in command.counts),
        _to_array(choice.slot),
        None if penalties is None else _to_arrays(penalties),
        None if choice.banned is None else _to_array(choice.banned),
        None if sampling is None else _to_arrays(sampling),
        choice.logprobs,
        None if prompt is None else (_to_array(prompt.targets), prompt.k),
    )


def _from_step(step: _Step) -> StepCommand:
    penalties, sampling, prompt = step.penalties, step.sampling, step.prompt_logprobs
    return StepCommand(
        step.bucket,
        step.decode,
        step.lora_mode,
        step.adapted,
        _from_array(step.packed, _INT),
        tuple(
            Counts(slot, _from_array(output, _INT), _from_array(prompt, _INT))
            for slot, output, prompt in step.counts
        ),
        Choice(
            _from_array(step.slot, _INT),
            None if penalties is None else PenaltyInputs(*_from_arrays(penalties, _PENALTIES)),
            None if step.banned is None else _from_array(step.banned, _INT, dimensions=2),
            None if sampling is None else SamplingInputs(*_from_arrays(sampling, _SAMPLING)),
            step.logprobs,
        ),
        None if prompt is None else PromptLogprobs(_from_array(prompt[0], _INT), prompt[1]),
    )


def _to_array(array: Any) -> _Array:
    return _Array(array.dtype.name, array.shape, memoryview(array.tobytes()))


def _to_arrays(inputs: PenaltyInputs | SamplingInputs) -> tuple[_Array, ...]:
    return tuple(_to_array(getattr(inputs, field.name)) for field in fields(inputs))


def _from_array(array: _Array, dtype: str, dimensions: int = 1) -> np.ndarray:
    """Raises ClusterError if it is of another type, or its bytes are not those of its shape."""
    size = math.prod(array.shape) * np.dtype(dtype).itemsize
    if (
        array.dtype != dtype
        or len(array.shape) != dimensions
        or min(array.shape) < 0
        or size != len(array.data)
    ):
        raise ClusterError(
            f"an array {array.dtype}{list(array.shape)} of {len(array.data)} bytes came in the "
            f"place of one of {dtype}"
        )
    return np.frombuffer(array.data, dtype).reshape(array.shape).copy()  # where it is aligned


def _from_arrays(arrays: tuple[_Array, ...], dtypes: tuple[str, ...]) -> list[np.ndarray]:
    if len(arrays) != len(dtypes):
        raise ClusterError(f"{len(arrays)} arrays came in the place of {len(dtypes)}")
    return [_from_array(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


# From and to bytes


def describe(error: BaseException) -> str:
    """An error as `Reply` and `Failed` have it."""
    return f"{type(error).__name__}: {error}"[:_MOST_ERROR]


_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Read | Stage | Drop | Enter | _Step | End).decode
_decode_reply = msgspec.msgpack.Decoder(Reply | Failed).decode


def encode(message: Command | Reply | Failed) -> bytes:
    """A message as bytes."""
    return _encode(_to_step(message) if isinstance(message, StepCommand) else message)


def decode_command(data: bytes) -> Command:
    """What process 0 has said.

    Raises:
        ClusterError: it is no command.
    """
    message = understand(_decode_command, data)
    return _from_step(message) if isinstance(message, _Step) else message


def decode_reply(data: bytes) -> Reply | Failed:
    """What another process has said.

    Raises:
        ClusterError: it is no reply.
    """
    return understand(_decode_reply, data)
