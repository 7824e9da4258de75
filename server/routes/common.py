# SPDX-License-Identifier: Apache-2.0
"""What all routes share: how they reach the front end, read bodies, and document errors."""

import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json

from server import errors
from server.frontend import FrontEnd
from slora_jax.openai.errors import ErrorResponse


class _JsonRequest(Request):
    _parsed: Any = None

    async def json(self) -> Any:
        if self._parsed is None:
            body = await self.body()
            try:
                self._parsed = from_json(body)
            except ValueError as error:
                raise json.JSONDecodeError(str(error), "", 0) from error
        return self._parsed


class JsonRoute(APIRoute):
    """Reads bodies with pydantic's parser: the standard library's lets through what is no text."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            if request.method == "POST":
                with suppress(json.JSONDecodeError):  # the route says it
                    request.app.state.front.config.check_body(await request.json())
            return await handler(request)

        return handle


# For the OpenAPI document; the keys are checked in `middleware.py`, before a body is read.
API_KEY = Security(HTTPBearer(auto_error=False, description="One of the server's --api-key."))


def _front_end(request: Request) -> FrontEnd:
    return request.app.state.front


Front = Annotated[FrontEnd, Depends(_front_end)]

_KINDS = (
    errors.Invalid,
    errors.Unauthorized,
    errors.Forbidden,
    errors.NotFound,
    errors.TooSlow,
    errors.TooLarge,
    errors.TooManyRequests,
    errors.Unavailable,
)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entries for errors."""
    found = {kind.status: kind for kind in _KINDS}
    return {
        status: {"model": ErrorResponse, "description": found[status].__doc__}
        for status in statuses
    }


BODY_ERRORS = documented(400, 401, 408, 413)
"""Of every route that reads a body."""
