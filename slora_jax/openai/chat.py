# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions`: the request, the response whole or in chunks, and the way to them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slora_jax.core import FinishReason, RequestError, RequestOutput
from slora_jax.openai.generation import IGNORED, REFUSED, GenerationRequest, Int64
from slora_jax.openai.logprobs import (
    ChatLogprobs,
    PromptLogprobs,
    chat_logprobs,
    prompt_logprobs,
)
from slora_jax.openai.messages import TEXT_ONLY, Message
from slora_jax.openai.replies import Tokens, Usage, as_one_piece
from slora_jax.openai.tokens import TokenTexts

_NO_TOOLS = "the model is given no tools; put them in the messages' text"


class ChatTemplateFields(BaseModel):
    """How a conversation becomes a prompt, with vLLM's names and defaults.

    Attributes:
        add_generation_prompt: end where the assistant's reply begins.
        continue_final_message: end inside the last message, so that the output continues it.
        chat_template_kwargs: variables for the model's chat template.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                "continue_final_message",
            )
        return self


class ChatCompletionRequest(GenerationRequest, ChatTemplateFields):
    """The body of a `/v1/chat/completions` request.

    Attributes:
        messages: the conversation; the model's chat template makes a prompt of it.
        add_special_tokens: in addition to those that the template writes.
        max_completion_tokens: goes before `max_tokens`.
        logprobs: show each token's log-probability.
        top_logprobs: and those of that many most likely tokens at its position, -1 for all.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "upper", "messages": [{"role": "user", "content": "hello reader"}]}
            ]
        }
    )

    refused: ClassVar[Mapping[str, tuple[object, str]]] = {
        **{name: entry for name, entry in REFUSED.items() if name != "suffix"},
        "tools": ([], _NO_TOOLS),
        "tool_choice": ("none", _NO_TOOLS),
        "functions": ([], _NO_TOOLS),
        "function_call": ("none", _NO_TOOLS),
        "modalities": (["text"], TEXT_ONLY),
        "audio": (None, TEXT_ONLY),
        "prediction": (None, "no output is predicted"),
        "web_search_options": (None, "nothing is searched"),
        "reasoning_effort": ("none", "use chat_template_kwargs if the model's template has such"),
        "verbosity": ("medium", "say it in a message"),
        "documents": ([], "put them in the messages"),
        "chat_template": (None, "the model's own is used"),
        "echo": (False, "use the completions API"),
        "best_of": (1, "use n"),
    }
    ignored: ClassVar[Mapping[str, str]] = {
        **IGNORED,
        "parallel_tool_calls": "there are no tools",
        "include_reasoning": "all output is content",
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    add_special_tokens: bool = False
    # Their ranges are checked here: `SamplingParams` knows them by other names.
    max_completion_tokens: Annotated[Int64, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Int64, Field(ge=-1)] = 0

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        return self

    def _overrides(self) -> dict[str, Any]:
        overrides: dict[str, Any] = {"logprobs": self.top_logprobs if self.logprobs else None}
        if self.max_completion_tokens is not None:
            overrides["max_tokens"] = self.max_completion_tokens
        return overrides


class ChatMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str


class ChatDelta(BaseModel):
    """A piece of an answer; the role comes with the first one."""

    role: Literal["assistant"] | None = None
    content: str


class _ChatChoiceBody(BaseModel):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatChoice(_ChatChoiceBody):
    """One answer. `token_ids` is absent unless it was asked for."""

    message: ChatMessage


class ChatChunkChoice(_ChatChoiceBody):
    """A piece of an answer; its `finish_reason` is null until the last."""

    delta: ChatDelta


class _ChatBody(BaseModel):
    id: str
    created: int
    model: str
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def to_json(self) -> str:
        """Without the fields that were not asked for."""
        return self.model_dump_json(exclude_unset=True)


class ChatCompletion(_ChatBody):
    """The body of a response."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_ChatBody):
    """One event of a stream: new text of one choice, or at the end the usage and no choice."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ChatReply:
    """Writes the response to one request, whole or in chunks.

    Args:
        request: what was asked.
        response_id: becomes part of the response's id.
        texts: of the model's tokens.
    """

    def __init__(self, request: ChatCompletionRequest, response_id: str, texts: TokenTexts) -> None:
        self._request = request
        self._texts = texts
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{request.request_id or response_id}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._tokens = Tokens(request.n)
        self._begun: set[int] = set()

    def response(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        """The response once all `n` choices are finished."""
        choices = []
        for index, output in enumerate(as_one_piece(outputs)):
            self._tokens.count(index, output)
            message = ChatMessage(role="assistant", content=output.text)
            choices.append(ChatChoice(message=message, **self._choice(index, output)))
        response = ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=self._tokens.usage()
        )
        self._add_prompt(response, outputs[0])
        return response

    def chunks(self, index: int, output: RequestOutput) -> Iterator[ChatCompletionChunk]:
        """What is new of a choice. Its first chunk has the role and no content, as OpenAI's."""
        self._tokens.count(index, output)
        if index not in self._begun:
            is_first = not self._begun
            self._begun.add(index)
            opening = ChatChunkChoice(
                index=index,
                delta=ChatDelta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
                stop_reason=None,
            )
            chunk = self._chunk(index, opening)
            if is_first:
                self._add_prompt(chunk, output)
            yield chunk
        delta = ChatDelta(content=output.new_text)
        yield self._chunk(index, ChatChunkChoice(delta=delta, **self._choice(index, output)))

    def usage_chunk(self) -> ChatCompletionChunk:
        """The last event of a stream that was asked for its usage."""
        return ChatCompletionChunk(
            **self._head,
            object="chat.completion.chunk",
            choices=[],
            usage=self._tokens.usage(),
        )

    def _chunk(self, index: int, choice: ChatChunkChoice) -> ChatCompletionChunk:
        extras: dict[str, Any] = {}
        if self._request.includes_continuous_usage:
            extras["usage"] = self._tokens.usage(index)
        return ChatCompletionChunk(
            **self._head, object="chat.completion.chunk", choices=[choice], **extras
        )

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        return {
            "index": index,
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            **({"token_ids": output.new_token_ids} if self._request.return_token_ids else {}),
        }

    def _logprobs(self, output: RequestOutput) -> ChatLogprobs | None:
        request, tokens = self._request, output.new_token_ids
        if not request.logprobs or output.logprobs is None:
            return None
        return chat_logprobs(
            tokens,
            output.logprobs[len(output.token_ids) - len(tokens) :],
            request.top_logprobs,
            self._texts,
            as_ids=request.return_tokens_as_token_ids,
        )

    def _add_prompt(self, body: _ChatBody, output: RequestOutput) -> None:
        """Adds what was asked for of the prompt; set, as pydantic would check it in one piece."""
        request = self._request
        if request.return_token_ids:
            body.prompt_token_ids = output.prompt_token_ids
        if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs(request.prompt_logprobs, output, self._texts)
