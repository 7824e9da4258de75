# SPDX-License-Identifier: Apache-2.0
"""The messages of a conversation, as a client sends them and as its template gets them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from slora_jax.core import RequestError

TEXT_ONLY = "messages and answers are text"
_MAY_BE_EMPTY = ("assistant", "function")


class TextPart(BaseModel):
    """A part of a message's content; further fields are the template's."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """What an assistant said instead of an answer: text as well."""

    model_config = ConfigDict(strict=True)

    type: Literal["refusal"]
    refusal: str


type Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(BaseModel):
    """One message of a conversation.

    Other fields (`tool_calls`, `tool_call_id`, `reasoning_content`, …) reach the model's chat
    template as they are: it says what becomes of them.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = Field(
        None, description="a string, or a list of text parts; an assistant's may be null"
    )
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, body: Any) -> Any:
        """Refuses what is not implemented, and a message without a content."""
        if not isinstance(body, dict):
            return body
        parts = body.get("content")
        for part in parts if isinstance(parts, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                raise RequestError(f"messages: {kind} is not supported: {TEXT_ONLY}", "messages")
        role = body.get("role")
        if parts is None and isinstance(role, str) and role not in _MAY_BE_EMPTY:
            raise PydanticCustomError("content", "content is required of this role")
        return body

    @property
    def text(self) -> str:
        """All parts of the content, as one."""
        if not isinstance(self.content, list):
            return self.content or ""
        texts = (part.text if isinstance(part, TextPart) else part.refusal for part in self.content)
        return "\n".join(texts)

    @property
    def has_more(self) -> bool:
        """Whether there is more than text that a template may work on."""
        parts = self.content if isinstance(self.content, list) else ()
        return bool(self.model_extra or self.tool_calls or any(part.model_extra for part in parts))

    def for_template(self) -> dict[str, Any]:
        """What chat templates expect: the message as it was sent.

        Null means absent, as in OpenAI's API, and templates only look whether a field is there; the
        content is null beside tool calls alone, where some templates ask for it.
        """
        sent = self.model_dump(exclude_unset=True)
        fields = {name: value for name, value in sent.items() if value is not None}
        if not fields.get("tool_calls"):
            fields.pop("tool_calls", None)
            fields.setdefault("content", "")
        elif "content" in sent:
            fields["content"] = sent["content"]
        if isinstance(self.content, list):
            fields["content"] = [_as_text(part) for part in fields["content"]]
        return fields


def _as_text(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    return {"type": "text", "text": part["refusal"]}
