# SPDX-License-Identifier: Apache-2.0
"""Answers a request for generation, whole or as a stream, until it ends or nobody listens."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.errors import HttpError, Unavailable, as_http_error
from server.frontend import FrontEnd
from server.generation import Generation
from server.logs import RequestRecord
from server.writing import is_large, write
from slora_jax.core import RequestOutput
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.errors import error_of

_LAST_EVENT_S = 1.0  # in which a client reads the event that says that its time is over
_CLIENT_GONE = 499  # for the log only: there is nobody to read it


class Reply(Protocol):
    """Writes the response to one request: see `CompletionReply` and `ChatReply`."""

    def response(self, outputs: Sequence[RequestOutput]) -> BaseModel: ...

    def chunks(self, index: int, output: RequestOutput) -> Iterator[BaseModel]: ...

    def usage_chunk(self) -> BaseModel: ...


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class _Deadline:
    """The time that a request has.

    Args:
        arrival: when it came, on the monotonic clock.
        seconds: from then on; None: as long as it takes.
    """

    def __init__(self, arrival: float, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else arrival + seconds

    @property
    def left(self) -> float | None:
        """Seconds from now on; None: as long as it takes."""
        return None if self._end is None else self._end - time.monotonic()

    async def keep[T](self, awaitable: Awaitable[T]) -> T:
        """Raises Unavailable if it takes longer."""
        try:
            async with asyncio.timeout(self.left):
                return await awaitable
        except TimeoutError:
            raise Unavailable(
                f"the request took longer than the {self._seconds:g} s that it may take "
                "(--request-timeout-s)"
            ) from None


class _EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however they end.

    Starlette cancels the iterator when the client disconnects, perhaps before it has begun: its own
    `finally` would not do. A client that does not read has no more time than others.
    """

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack, deadline: _Deadline) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._deadline.left
        with self._held, suppress(TimeoutError):
            # Some time more than the events have, whose own end says why.
            async with asyncio.timeout(None if left is None else left + _LAST_EVENT_S):
                await super().__call__(scope, receive, send)


async def answer(
    front: FrontEnd, http: Request, request: CompletionRequest | ChatCompletionRequest, reply: Reply
) -> Response:
    """The response to a request for generation.

    The first tokens are waited for before a stream begins: what is refused has a status of its own
    then. When the client disconnects, the engine is told to stop at once.

    Raises:
        HttpError: there is none.
    """
    record: RequestRecord = http.state.record
    record.describe(request, with_content=front.config.enable_log_requests)
    deadline = _Deadline(record.arrival, front.config.request_timeout_s)
    with ExitStack() as held:
        held.enter_context(front.answering())
        try:
            submitting = front.submit(request, record.arrival, http.state.tenant, held)
            generation = await _while_connected(http.receive, deadline.keep(submitting))
            held.callback(record.count, generation)
            if not request.stream:
                waiting = deadline.keep(generation.wait())
                outputs = await _while_connected(http.receive, waiting)
                _check(outputs)
                threads = front.threads if is_large(outputs, whole=True) else None
                content = await write(lambda: [reply.response(outputs)], threads)
                return Response(content, media_type="application/json")
            events = _Events(generation, reply, front.threads)
            waiting = deadline.keep(events.next())
            first = await _while_connected(http.receive, waiting)
        except _ClientGone:
            return Response(status_code=_CLIENT_GONE)
        stream = events.all(first, request.includes_usage, deadline)
        return _EventStream(stream, held.pop_all(), deadline)


class _Events:
    """A stream's events, as bytes."""

    def __init__(self, generation: Generation, reply: Reply, threads: Executor) -> None:
        self._generation = generation
        self._reply = reply
        self._threads = threads

    async def all(
        self, first: bytes, includes_usage: bool, deadline: _Deadline
    ) -> AsyncIterator[bytes]:
        """Those that `next` gave, and all that follow until the end."""
        try:
            yield first
            while not self._generation.exhausted:  # more may have come to a client that is slow
                yield await deadline.keep(self.next())
            if includes_usage:
                yield await self._written([self._reply.usage_chunk()])
        except HttpError as error:
            yield await self._written([error.body()])
        yield b"data: [DONE]\n\n"

    async def next(self) -> bytes:
        """Waits for something new."""
        pieces = await self._generation.next()
        _check(output for _, output in pieces)
        threads = None
        if is_large((output for _, output in pieces), whole=False):
            threads = self._threads
            pieces = [(index, _as_it_is(output)) for index, output in pieces]
        return await self._written(
            (chunk for piece in pieces for chunk in self._reply.chunks(*piece)), threads
        )

    async def _written(self, bodies: Iterable[BaseModel], threads: Executor | None = None) -> bytes:
        return await write(lambda: bodies, threads, (b"data: ", b"\n\n"))


def _as_it_is(output: RequestOutput) -> RequestOutput:
    """A copy that does not grow while a thread reads it."""
    logprobs = None if output.logprobs is None else [*output.logprobs]
    return replace(output, token_ids=[*output.token_ids], logprobs=logprobs)


def _check(outputs: Iterable[RequestOutput]) -> None:
    """Raises HttpError if one of them has no answer."""
    for error in filter(None, map(error_of, outputs)):
        raise as_http_error(error)


async def _while_connected[T](receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives; cancels it and raises _ClientGone if the client disconnects before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
