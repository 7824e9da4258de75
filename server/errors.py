# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the way to the engine, as HTTP says it."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from slora_jax.core import PromptTooLongError, RequestError
from slora_jax.openai.errors import ErrorInfo, ErrorResponse


class HttpError(Exception):
    """An answer that is an error.

    Args:
        message: for a person to act on.
        param: the field that it is about.
        retry_after: seconds after which it may be tried again.
    """

    status = 500
    kind = "InternalServerError"
    code: str | None = None  # OpenAI's, where clients look at it

    def __init__(
        self, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> ErrorResponse:
        code: Any = self.status if self.code is None else self.code
        info = ErrorInfo(message=str(self), type=self.kind, param=self.param, code=code)
        return ErrorResponse(error=info)


class Invalid(HttpError):
    """The request can't be served as asked."""

    status, kind = 400, "BadRequestError"


class TooLong(Invalid):
    """The prompt leaves no room for output."""

    code = PromptTooLongError.code


class Unauthorized(HttpError):
    """The API key is missing or wrong."""

    status, kind = 401, "AuthenticationError"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(HttpError):
    """The server was started without this, or another key may do it."""

    status, kind = 403, "PermissionDeniedError"


class NotFound(HttpError):
    """Nothing has this name."""

    status, kind = 404, "NotFoundError"


class TooSlow(HttpError):
    """The headers or the body did not arrive in time."""

    status, kind = 408, "RequestTimeoutError"


class TooLarge(HttpError):
    """The body is larger than the server takes."""

    status, kind = 413, "RequestTooLargeError"


class HeadersTooLarge(HttpError):
    """The headers are larger or more than the server takes."""

    status, kind = 431, "RequestHeaderFieldsTooLargeError"


class TooManyRequests(HttpError):
    """The queue is full, a tenant has used its share or its quota, or bodies take all the room."""

    status, kind = 429, "RateLimitError"


class Unavailable(HttpError):
    """The engine is loading, dead or draining, or was too slow."""

    status, kind = 503, "ServiceUnavailableError"


def error_response(error: HttpError) -> JSONResponse:
    """The answer itself."""
    return JSONResponse(error.body().model_dump(), error.status, dict(error.headers))


def as_http_error(error: RequestError) -> HttpError:
    """The answer to a request that the engine's side refuses."""
    if isinstance(error, PromptTooLongError):
        return TooLong(str(error), error.param)
    info = ErrorResponse.of(error).error
    kinds = {kind.status: kind for kind in (Invalid, NotFound, Unavailable)}
    retry_after = 1 if info.code == Unavailable.status else None
    return kinds[int(info.code)](info.message, info.param, retry_after)
