# SPDX-License-Identifier: Apache-2.0
"""`/tokenize` and `/detokenize`, as vLLM has them."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest, ChatTemplateFields
from slora_jax.openai.generation import Int64, ModelName, refuse
from slora_jax.openai.messages import Message


class TokenizeRequest(ChatTemplateFields):
    """The body of a `/tokenize` request: a `prompt`, or the `messages` of a conversation.

    Attributes:
        add_special_tokens: null: as the completions APIs do, true for a prompt, false for messages.
        return_token_strs: show the text of each token.
    """

    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"prompt": "hello reader"}]}
    )

    # Those that would change the prompt.
    refused: ClassVar[Mapping[str, tuple[object, str]]] = {
        name: ChatCompletionRequest.refused[name]
        for name in ("tools", "documents", "chat_template")
    }

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, body: Any) -> Any:
        """Refuses what is not implemented, and takes null for the default."""
        if not isinstance(body, dict):
            return body
        refuse(body, cls.refused)
        return {name: value for name, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        return self


class TokenizeResponse(BaseModel):
    """Token ids, and the most that a request may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    """The body of a `/detokenize` request."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"tokens": [104, 105]}]})

    model: ModelName | None = None
    tokens: Annotated[list[Int64], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    """The text of the tokens, special ones included."""

    prompt: str
