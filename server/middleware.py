# SPDX-License-Identifier: Apache-2.0
"""What happens to every request before and after its route: an id and a log line, keys, limits.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would hide disconnects from the routes.
"""

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import HttpError, TooLarge, TooSlow, Unauthorized
from server.logs import RequestRecord, logger

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_BODY_S = 60.0  # in which a body is to arrive
_OPEN_PATHS = ("/", "/health", "/ping", "/metrics", "/version", "/openapi.json")
_OPEN_FOLDER = "/static/"
_QUIET_PATHS = ("/health", "/ping", "/metrics", "/status")  # asked for all the time


def error_response(error: HttpError) -> JSONResponse:
    return JSONResponse(error.body().model_dump(), error.status, dict(error.headers))


class RequestLog:
    """Gives each request an id, and writes a line when it is over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(request_id, time.monotonic())
        scope.setdefault("state", {})["record"] = record
        status, begun = 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("a bug", extra={"request_id": request_id})
            if begun:
                raise  # closes the connection
            error = HttpError("an internal error; the server's log says more")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _QUIET_PATHS:
                record.write(scope["method"], scope["path"], status)


class ApiKeys:
    """Asks for a bearer token, but where probes, scrapers and the page come.

    Args:
        app: what is behind it.
        keys: those that are good; empty: nobody is asked.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = Unauthorized("send one of the server's API keys: Authorization: Bearer KEY")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if not self._digests or path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
            return True
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # All are compared, each in constant time: how long it takes tells nothing about a key.
        equal = [hmac.compare_digest(digest, good) for good in self._digests]
        return kind.lower() == "bearer" and any(equal)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class BodyLimit:
    """Ends requests whose body is too large or too slow.

    Args:
        app: what is behind it.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = TooLarge(f"a body may have {self._most_bytes} bytes (--max-body-mib)")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._most_bytes:
            await error_response(too_large)(scope, receive, send)
            return
        until = time.monotonic() + _BODY_S
        size, more = 0, True

        async def receive_some() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise _Signal(TooSlow(f"the body took longer than {_BODY_S:g} s")) from None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > self._most_bytes:
                raise _Signal(too_large)
            return message

        await self._app(scope, receive_some, send)


class _Signal(HTTPException):
    """The exception that FastAPI lets through while it reads a body."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.status, str(error))
        self.error = error


def as_error(exception: HTTPException) -> HttpError:
    """Of Starlette's exceptions: no such route, no such method, and those raised here."""
    if isinstance(exception, _Signal):
        return exception.error
    error = HttpError(str(exception.detail))
    error.status = exception.status_code
    error.kind = "NotFoundError" if exception.status_code == 404 else "BadRequestError"
    return error
