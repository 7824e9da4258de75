# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: routes, errors, and the page at /."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from server.bodies import BodyLimit
from server.errors import HttpError, Invalid, as_http_error, error_response
from server.frontend import FrontEnd
from server.middleware import ApiKeys, RequestLog, as_error
from server.routes import completions, models, operations
from slora_jax import __version__
from slora_jax.core import RequestError
from slora_jax.openai.errors import as_request_error

_STATIC = Path(__file__).parent / "static"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-cache"}


def make_app(front: FrontEnd) -> FastAPI:
    """The application over a front end, whose engine it starts and stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = asyncio.create_task(front.client.run())
        try:
            yield
        finally:
            engine.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await engine

    app = FastAPI(
        title="slora-jax",
        version=__version__,
        summary="One base Llama and many LoRA adapters, under OpenAI's API with vLLM's extensions.",
        lifespan=lifespan,
        docs_url=None,  # the pages of FastAPI's load scripts from elsewhere
        redoc_url=None,
        middleware=[
            Middleware(RequestLog),
            Middleware(ApiKeys, keys=front.config.api_keys, admin_keys=front.config.admin_api_keys),
            Middleware(BodyLimit, limits=front.config),
        ],
    )
    app.state.front = front
    for routes in (completions, models, operations):
        app.include_router(routes.router)
    app.mount("/static", StaticFiles(directory=_STATIC))
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_exception_handler(HttpError, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _starlette_error)
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds and nobody gets: it is a 400 here."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
    assert app.openapi_schema is not None
    return app.openapi_schema


async def _page() -> FileResponse:
    return FileResponse(_STATIC / "index.html", headers=_PAGE_HEADERS)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is not what the route describes: 400, as OpenAI and vLLM have it."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    cause = errors[0].get("ctx", {}).get("error")
    if errors[0]["type"] == "json_invalid":
        return error_response(Invalid(f"the body is no JSON: {cause}"))
    if errors[0]["loc"] == ("body",) and not isinstance(cause, RequestError):
        return error_response(Invalid("the body must be a JSON object, sent as application/json"))
    errors = [{**one, "loc": one["loc"][1:]} for one in errors]  # inside the body
    kind = get_type_hints(request.scope["route"].endpoint).get("body", BaseModel)
    return error_response(as_http_error(as_request_error(errors, kind)))


async def _starlette_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(as_error(error))
    response.headers.update(error.headers or {})
    return response
