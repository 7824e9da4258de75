# SPDX-License-Identifier: Apache-2.0
"""Limits of request bodies, kept while they arrive: size, time, values, and memory for all."""

import asyncio
import re
import time
from collections import Counter, deque

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    HttpError,
    Invalid,
    TooLarge,
    TooManyRequests,
    TooSlow,
    error_response,
)
from server.limits import Limits

_SMALL_BODY = 64 * 1024  # bytes; bodies up to here are bounded by the number of connections


class BodyLimit:
    """Ends requests whose body is too large, too slow, or holds too many values.

    Bodies stay in memory while their requests are in progress. All that are not small share a
    budget, of which one API key may take half.

    Args:
        app: what is behind it.
        limits: the server's.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._held = Counter[str | None]()  # bytes, by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant: str | None = scope["state"]["tenant"]
        body = _Body(self._limits)
        held = 0

        async def receive_some() -> Message:
            nonlocal held
            if body.whole:
                return await receive()
            message = await body.take(receive)
            if body.size > _SMALL_BODY:
                self._held[tenant] += body.size - held
                held = body.size
                self._check_budget(tenant)
            return message

        try:
            body.check_declared(Headers(scope=scope).get("content-length", ""))
        except BodyRefused as refusal:
            await error_response(refusal.error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive_some, send)
        finally:
            self._held[tenant] -= held
            if not self._held[tenant]:
                del self._held[tenant]

    def _check_budget(self, tenant: str | None) -> None:
        most = self._limits.max_bodies_bytes
        if self._held.total() > most or (tenant and self._held[tenant] > most // 2):
            raise BodyRefused(
                TooManyRequests(
                    "the bodies of the requests in progress take all the memory there is for them "
                    "(--max-bodies-mib): try again later",
                    retry_after=1,
                )
            )


class _Body:
    """One body as it arrives.

    Attributes:
        size: bytes so far.
        whole: whether all of it is here.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._until = time.monotonic() + limits.body_timeout_s
        self._json = JsonValues()
        self.size = 0
        self.whole = False

    def check_declared(self, length: str) -> None:
        """Raises BodyRefused if a `Content-Length` announces too much."""
        if length.isdecimal() and len(length) < 20:
            self._check_size(int(length))

    async def take(self, receive: Receive) -> Message:
        """The next piece. Raises BodyRefused if it is not taken."""
        limits = self._limits
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await receive()
        except TimeoutError:
            limit = f"{limits.body_timeout_s:g} s (--body-timeout-s)"
            raise BodyRefused(TooSlow(f"the body took longer than {limit}")) from None
        piece = message.get("body", b"")
        self.size += len(piece)
        self.whole = not message.get("more_body", False)
        self._check_size(self.size)
        if self._json.feed(piece) > limits.max_body_values:
            raise BodyRefused(
                Invalid(
                    f"a body may hold {limits.max_body_values} keys and values "
                    "(--max-body-values): send fewer prompts or tokens in a request"
                )
            )
        return message

    def _check_size(self, size: int) -> None:
        most = self._limits.max_body_bytes
        if size > most:
            raise BodyRefused(TooLarge(f"a body may have {most} bytes (--max-body-mib)"))


class BodyRefused(HTTPException):
    """The exception that FastAPI lets through while it reads a body."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.status, str(error))
        self.error = error


# A string, or as much of one as there is: then its last byte may be an escape.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:(?P<end>")|(?P<escape>\\?)\Z)', re.DOTALL)
_BEFORE_VALUES = (b",", b":", b"[", b"{")


class JsonValues:
    """Counts the keys and values of a JSON text while it arrives, in time linear in its length.

    Parsing and checking a text takes time by its values rather than by its bytes, and in one piece:
    nothing else runs on the event loop meanwhile. So they are counted before. The count is an upper
    bound, exact but for empty arrays and objects; of what is not JSON it is some number.
    """

    def __init__(self) -> None:
        self._count = 1
        self._in_string = False
        self._escaped = False

    def feed(self, piece: bytes) -> int:
        """Takes the next bytes; the count so far."""
        if self._escaped:
            piece, self._escaped = piece[1:], not piece
        if self._in_string:
            piece = b'"' + piece
        last = next(iter(deque(_STRING.finditer(piece), maxlen=1)), None)
        self._in_string = last is not None and last["end"] is None
        if last is not None and last["escape"]:
            self._escaped = True
        bare = _STRING.sub(b"", piece)
        self._count += sum(map(bare.count, _BEFORE_VALUES))
        return self._count
