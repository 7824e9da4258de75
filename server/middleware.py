# SPDX-License-Identifier: Apache-2.0
"""What happens to every request before and after its route: an id, a log line, API keys.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would hide disconnects from the routes.
"""

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.bodies import BodyRefused
from server.errors import Forbidden, HttpError, Unauthorized, error_response
from server.logs import RequestRecord, logger

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_PROBES = ("/health", "/health/live", "/health/ready", "/ping")
_OPEN_PATHS = ("/", *_PROBES, "/metrics", "/version", "/openapi.json")
_OPEN_FOLDER = "/static/"
_ADMIN_PATHS = tuple(
    f"{version}/{verb}_lora_adapter" for version in ("", "/v1") for verb in ("load", "unload")
)
_QUIET_PATHS = (*_PROBES, "/metrics", "/status")  # asked for all the time


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
        scope.setdefault("state", {}).update(record=record, tenant=None)
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

    The request's tenant is its key: `scope["state"]["tenant"]`, None where no key is asked for.

    Args:
        app: what is behind it.
        keys: those that are good; empty: no key is asked for.
        admin_keys: those that may load and unload adapters, and all else; empty: as `keys`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._app = app
        self._admins = [_digest(key) for key in admin_keys]
        self._clients = [*map(_digest, keys), *self._admins] if keys else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._check(scope)
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> HttpError | None:
        path: str = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
        needed = self._admins if self._admins and path in _ADMIN_PATHS else self._clients
        if is_open or not needed:
            return None
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip()) if kind.lower() == "bearer" else b""
        if _is_among(digest, needed):
            scope["state"]["tenant"] = f"key {digest.hex()[:8]}"
            return None
        if _is_among(digest, self._clients):
            return Forbidden("this needs one of the server's --admin-api-key")
        return Unauthorized("send one of the server's API keys: Authorization: Bearer KEY")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_among(digest: bytes, good: Sequence[bytes]) -> bool:
    # All are compared, each in constant time: how long it takes tells nothing about a key.
    return any([hmac.compare_digest(digest, one) for one in good])


def as_error(exception: HTTPException) -> HttpError:
    """Of Starlette's exceptions: no such route, no such method, a body that is not taken."""
    if isinstance(exception, BodyRefused):
        return exception.error
    error = HttpError(str(exception.detail))
    error.status = exception.status_code
    error.kind = "NotFoundError" if exception.status_code == 404 else "BadRequestError"
    return error
