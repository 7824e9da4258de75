# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`: the request, the response whole or in chunks, and the way to them."""

import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from slora_jax.core import FinishReason, RequestError, RequestOutput
from slora_jax.openai.generation import GenerationRequest, Int64
from slora_jax.openai.logprobs import (
    CompletionLogprobs,
    PromptLogprobs,
    completion_logprobs,
    completion_offsets,
    prompt_logprobs,
)
from slora_jax.openai.replies import Tokens, Usage, as_one_piece, without_generated
from slora_jax.openai.tokens import TokenOffsets, TokenTexts

_PROMPT = "a string, a list of token ids, or a list of either"
_LEAST_INT64, _MOST_INT64 = -(2**63), 2**63 - 1


def _check_prompt(prompt: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Checks lists as a whole: pydantic would try each kind of list on each of a million tokens."""
    if isinstance(prompt, str):
        return check(prompt)
    kinds = {*map(type, prompt)} if isinstance(prompt, list) else None
    if kinds == {list}:
        good = all(map(_are_tokens, prompt))
    else:
        good = kinds == {str} or (kinds is not None and _are_tokens(prompt))
    if not good:
        raise RequestError(f"prompt must be {_PROMPT}", "prompt")
    return prompt


def _are_tokens(ids: list[Any]) -> bool:
    if not ids:
        return True
    return {*map(type, ids)} == {int} and _LEAST_INT64 <= min(ids) <= max(ids) <= _MOST_INT64


def _count(logprobs: Any) -> Any:
    return (1 if logprobs else None) if isinstance(logprobs, bool) else logprobs


type Prompt = Annotated[
    str | list[Int64] | list[str] | list[list[Int64]], WrapValidator(_check_prompt)
]


class CompletionRequest(GenerationRequest):
    """The body of a `/v1/completions` request.

    Attributes:
        max_tokens: null: as many as the model's length allows, as in vLLM. 0 with `echo` scores
            the prompt and generates nothing.
        logprobs: of that many most likely tokens at each position, -1 for all; true is 1, as in
            vLLM. With `echo` the prompt's positions are included.
        prompt_logprobs: the same for the prompt, in vLLM's shape.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "upper", "prompt": "hello reader", "max_tokens": 32}]
        }
    )

    prompt: Prompt = Field(description=_PROMPT)
    max_tokens: Int64 | None = 16
    best_of: int | None = None
    echo: bool = False
    logprobs: Annotated[Int64 | None, BeforeValidator(_count)] = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n):
            raise RequestError("best_of is not supported: it must be n or absent", "best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt gets `n` choices."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [cast(str | list[int], self.prompt)]
        return list(cast(list[str] | list[list[int]], self.prompt))

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def scores_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    def _overrides(self) -> dict[str, Any]:
        overrides: dict[str, Any] = {}
        if self.scores_only:  # the engine samples at least one token, which nobody gets to see
            overrides = {"max_tokens": 1, "min_tokens": 0}
        if self.echo:
            overrides["prompt_logprobs"] = _most(self.logprobs, self.prompt_logprobs)
        return overrides


def _most(*asked: int | None) -> int | None:
    """The number of log-probabilities that covers all that was asked for; -1 is all."""
    numbers = [k for k in asked if k is not None]
    return -1 if -1 in numbers else max(numbers, default=None)


class CompletionChoice(BaseModel):
    """One answer to one prompt, or a piece of it: then its `finish_reason` is null until the last.

    The last three fields are absent unless they were asked for; those of the prompt come with the
    first piece.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class _CompletionBody(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]

    def to_json(self) -> str:
        """Without the fields that were not asked for."""
        return self.model_dump_json(exclude_unset=True)


class CompletionResponse(_CompletionBody):
    """The body of a response."""

    usage: Usage


class CompletionChunk(_CompletionBody):
    """One event of a stream: new text of one choice, or at the end the usage and no choice."""

    usage: Usage | None = None


class CompletionReply:
    """Writes the response to one request, whole or in chunks.

    Args:
        request: what was asked.
        response_id: becomes part of the response's id.
        texts: of the model's tokens.
    """

    def __init__(self, request: CompletionRequest, response_id: str, texts: TokenTexts) -> None:
        self._request = request
        self._texts = texts
        self._head: dict[str, Any] = {
            "id": f"cmpl-{request.request_id or response_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._tokens = Tokens(request.n)
        self._echoed: dict[int, str] = {}  # by choice, of those that have begun
        self._offsets: dict[int, TokenOffsets] = {}  # the same, if there are log-probabilities

    def response(self, outputs: Sequence[RequestOutput]) -> CompletionResponse:
        """The response once all choices are finished: prompt by prompt, `n` of each."""
        choices = [self._choice(i, output) for i, output in enumerate(as_one_piece(outputs))]
        return CompletionResponse(**self._head, choices=choices, usage=self._tokens.usage())

    def chunks(self, index: int, output: RequestOutput) -> Iterator[CompletionChunk]:
        """What is new of a choice."""
        choice = self._choice(index, output)
        if self._request.includes_continuous_usage:
            usage = self._tokens.usage(index)
            yield CompletionChunk(**self._head, choices=[choice], usage=usage)
        else:
            yield CompletionChunk(**self._head, choices=[choice])

    def usage_chunk(self) -> CompletionChunk:
        """The last event of a stream that was asked for its usage."""
        return CompletionChunk(**self._head, choices=[], usage=self._tokens.usage())

    def _choice(self, index: int, output: RequestOutput) -> CompletionChoice:
        request = self._request
        if request.scores_only:
            output = without_generated(output)
        self._tokens.count(index, output)
        begins = index not in self._echoed
        if begins:
            self._echoed[index] = self._echo(index, output)
            if request.logprobs is not None:
                self._offsets[index] = self._offsets_after(output.prompt_token_ids)
        choice = CompletionChoice(
            index=index,
            text=(self._echoed[index] if begins else "") + output.new_text,
            logprobs=self._logprobs(index, output, begins),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        # Set afterwards: pydantic would check these long lists, in one piece.
        if begins and request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(request.prompt_logprobs, output, self._texts)
        if request.return_token_ids:
            if begins:
                choice.prompt_token_ids = output.prompt_token_ids
            choice.token_ids = output.new_token_ids
        return choice

    def _echo(self, index: int, output: RequestOutput) -> str:
        if not self._request.echo:
            return ""
        prompt = self._request.prompts[index // self._request.n]
        if isinstance(prompt, str):
            return prompt
        skip = self._request.skip_special_tokens
        return self._texts.decode(output.prompt_token_ids, skip_special_tokens=skip)

    def _offsets_after(self, context: Sequence[int]) -> TokenOffsets:
        skip = self._request.skip_special_tokens
        return TokenOffsets(self._texts, context, skip_special_tokens=skip)

    def _logprobs(
        self, index: int, output: RequestOutput, begins: bool
    ) -> CompletionLogprobs | None:
        """Of the new tokens, and with `echo` of the prompt before the first ones."""
        request, echoed = self._request, self._echoed[index]
        if request.logprobs is None:
            return None
        tokens = list(output.new_token_ids)
        first = len(output.token_ids) - len(tokens)
        positions = list[Any]((output.logprobs or [])[first:])
        offsets = list(completion_offsets(output, self._offsets[index], len(echoed)))
        if request.echo and begins:
            prompt = output.prompt_token_ids
            before = self._offsets_after([]).append(prompt)
            offsets = [min(offset, len(echoed)) for offset in before] + offsets
            positions = [*(output.prompt_logprobs or []), *positions]
            tokens = prompt + tokens
        return completion_logprobs(
            tokens,
            positions,
            offsets,
            request.logprobs,
            self._texts,
            as_ids=request.return_tokens_as_token_ids,
        )
