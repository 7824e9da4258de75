# SPDX-License-Identifier: Apache-2.0
"""What one step tells the device: a single int32 array, packed on the host, unpacked under jit.

One array is one copy to the device; every field has a fixed place that follows from the bucket.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int
from numpy.typing import ArrayLike

from slora_jax.core import FROM_DEVICE


class Bucket(NamedTuple):
    """The shape that a step is compiled for."""

    tokens: int  # T
    rows: int  # B
    segments: int  # G
    page_updates: int  # changes to the page table


@struct.dataclass
class StepInputs:
    """The rows of a step, sorted by adapter with the base model's last, and their tokens in order.

    A row is one request's part of the step. Padding tokens and rows come last.
    """

    tokens: Int[Array, " T"]  # FROM_DEVICE where the host is a step behind
    positions: Int[Array, " T"]
    row: Int[Array, " T"]  # the row that owns each token; B for padding
    slot: Int[Array, " B"]  # each row's line of the page table; its size for padding
    query_start: Int[Array, " B"]
    query_len: Int[Array, " B"]
    context_len: Int[Array, " B"]  # tokens known to attention after this step
    segment_slot: Int[Array, " G"]  # adapter slot of each run of rows
    segment_tokens: Int[Array, " G"]
    segment_rows: Int[Array, " G"]
    update_slot: Int[Array, " U"]  # page_table[update_slot, update_column] = update_page
    update_column: Int[Array, " U"]
    update_page: Int[Array, " U"]

    @staticmethod
    def sizes(bucket: Bucket) -> dict[str, int]:
        """Length of every field, in order."""
        tokens, rows, segments, updates = bucket
        names = [field.name for field in fields(StepInputs)]
        sizes = [tokens] * 3 + [rows] * 4 + [segments] * 3 + [updates] * 3
        return dict(zip(names, sizes, strict=True))

    @classmethod
    def unpack(cls, packed: Int[Array, " n"], bucket: Bucket) -> "StepInputs":
        """The fields as slices of the packed array."""
        parts, start = {}, 0
        for name, size in cls.sizes(bucket).items():
            parts[name] = packed[start : start + size]
            start += size
        return cls(**parts)

    @classmethod
    def pack(
        cls, values_of: Mapping[str, ArrayLike], padding: dict[str, int], bucket: Bucket
    ) -> Int[np.ndarray, " n"]:
        """The fields one after another, each filled up with its padding value (default 0)."""
        parts = []
        for name, size in cls.sizes(bucket).items():
            values = np.asarray(values_of[name], np.int32)
            if len(values) > size:
                raise ValueError(f"{name} has {len(values)} entries, the bucket {bucket} {size}")
            fill = np.full(size - len(values), padding.get(name, 0), np.int32)
            parts += [values, fill]
        return np.concatenate(parts)


def resolve_tokens(inputs: StepInputs, last_token: Int[Array, " slots"]) -> Int[Array, " T"]:
    """The step's token ids, with those that the host doesn't know taken from `last_token`."""
    slot = inputs.slot.at[inputs.row].get(mode="clip")
    known = inputs.tokens != FROM_DEVICE
    return jnp.where(known, inputs.tokens, last_token.at[slot].get(mode="clip"))
