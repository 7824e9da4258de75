# SPDX-License-Identifier: Apache-2.0
"""What all routes share: how they reach the front end, read bodies, and document errors."""

import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json

from server import errors
from server.bodies import BodyRefused
from server.frontend import FrontEnd
from slora_jax.openai.errors import ErrorResponse


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            parsed = from_json(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error
        try:
            self.app.state.front.config.check_body(parsed)
        except errors.Invalid as error:
            raise BodyRefused(error) from error
        return parsed


class JsonRoute(APIRoute):
    """Reads bodies with pydantic's parser: the standard library's lets through what is no text."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

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
