# SPDX-License-Identifier: Apache-2.0
"""Replies as JSON, those that are large in a thread and in pieces.

Log-probabilities of a long prompt are a hundred thousand numbers. Written on the event loop, or by
one call that holds Python's lock, they would hold up everything else.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor

from pydantic import BaseModel
from pydantic_core import to_json

from slora_jax.core import RequestOutput

_LARGE = 64  # positions with log-probabilities, some milliseconds
_BLOCK = 256  # elements of a list that are written at a time


async def write(
    bodies: Callable[[], Iterable[BaseModel]],
    threads: Executor | None,
    frame: tuple[bytes, bytes] = (b"", b""),
) -> bytes:
    """The JSON of each body, between the two parts of a frame.

    Args:
        bodies: makes them.
        threads: where they are made and written; None: here and at once.
        frame: what goes before and after each.
    """
    before, after = frame

    def in_pieces() -> bytes:
        return b"".join(piece for body in bodies() for piece in (before, *json_pieces(body), after))

    if threads is not None:
        return await asyncio.get_running_loop().run_in_executor(threads, in_pieces)
    return b"".join(
        before + body.model_dump_json(exclude_unset=True).encode() + after for body in bodies()
    )


def is_large(outputs: Iterable[RequestOutput], *, whole: bool) -> bool:
    """Whether a reply with these is to be written in a thread: all of them, or what is new."""
    return sum(_positions(output, whole) for output in outputs) > _LARGE


def _positions(output: RequestOutput, whole: bool) -> int:
    """Those with log-probabilities."""
    shown = len(output.token_ids if whole else output.new_token_ids)
    found = 0 if output.logprobs is None else shown
    if output.prompt_logprobs is not None and shown == len(output.token_ids):
        found += len(output.prompt_logprobs)
    return found


def json_pieces(body: BaseModel) -> Iterator[bytes]:
    """`body.model_dump_json(exclude_unset=True)` in pieces, each of which is quickly made."""
    for number, name in enumerate(_set_fields(body)):
        yield (b"," if number else b"{") + to_json(name) + b":"
        value = getattr(body, name)
        if isinstance(value, BaseModel):
            yield from json_pieces(value)
        elif isinstance(value, list):
            yield from _list_pieces(value)
        else:
            yield to_json(value)
    yield b"}" if body.model_fields_set else b"{}"


def _set_fields(body: BaseModel) -> list[str]:
    return [name for name in type(body).model_fields if name in body.model_fields_set]


def _list_pieces(values: list) -> Iterator[bytes]:
    yield b"["
    if values and isinstance(values[0], BaseModel):  # choices
        for number, value in enumerate(values):
            yield b"," if number else b""
            yield from json_pieces(value)
    else:
        for start in range(0, len(values), _BLOCK):
            block = to_json(values[start : start + _BLOCK])[1:-1]
            yield (b"," if start else b"") + block
    yield b"]"
