# SPDX-License-Identifier: Apache-2.0
"""Error objects in OpenAI's shape, and JSON bodies that are checked against a model."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from slora_jax.core import (
    FinishReason,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    RequestOutput,
)


class UnknownModelError(RequestError):
    """A name that is neither the base model's nor an adapter's."""

    def __init__(self, model: str, param: str = "model") -> None:
        super().__init__(f"The model `{model}` does not exist.", param)


class ErrorInfo(BaseModel):
    """What is wrong; `type` is vLLM's name of the HTTP status, `code` it or a word of OpenAI's."""

    message: str
    type: str
    param: str | None
    code: int | Literal["context_length_exceeded"]


class ErrorResponse(BaseModel):
    """The body of an error."""

    error: ErrorInfo

    @classmethod
    def of(cls, error: RequestError) -> "ErrorResponse":
        """The error object of a request that is not served."""
        kind: str = "BadRequestError"
        code: Any = 400
        if isinstance(error, UnknownModelError):
            kind, code = "NotFoundError", 404
        elif isinstance(error, PromptTooLongError):
            code = error.code
        elif isinstance(error, OverloadedError):
            kind, code = "ServiceUnavailableError", 503
        return cls(error=ErrorInfo(message=str(error), type=kind, param=error.param, code=code))

    def to_json(self) -> str:
        return self.model_dump_json()


def error_of(output: RequestOutput) -> RequestError | None:
    """Why a finished request has no answer: None if it has one."""
    if output.finish_reason is FinishReason.ERROR:
        return RequestError(str(output.stop_reason), "model")
    if output.finish_reason is FinishReason.REJECTED:
        return OverloadedError(str(output.stop_reason))
    return None


def parse_body[Body: BaseModel](kind: type[Body], body: bytes | str) -> Body:
    """Reads a JSON body.

    Raises:
        RequestError: it is no JSON, or not what `kind` describes; names the first bad field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise as_request_error(error.errors(include_url=False), kind) from None


def as_request_error(errors: Sequence[Any], kind: type[BaseModel] | None = None) -> RequestError:
    """What pydantic found, in the words of the first bad field.

    Args:
        errors: of a `ValidationError`.
        kind: the model, whose fields may describe themselves.
    """
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):  # a validator of ours, which pydantic wrapped
        return cause
    if not first["loc"]:
        return RequestError(first["msg"])
    param = str(first["loc"][0])
    field = None if kind is None else kind.model_fields.get(param)
    inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    inner = inner.removeprefix(".")
    if first["type"] == "missing":
        return RequestError(f"{inner} is required", param)
    if field is not None and field.description:  # of a union pydantic would name each branch
        return RequestError(f"{param} must be {field.description}", param)
    return RequestError(f"{inner}: {first['msg']}", param)
