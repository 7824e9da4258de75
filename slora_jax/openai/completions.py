# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`: the request, the response, and the way from one to the other."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, Field, model_validator

from slora_jax.core import (
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from slora_jax.openai.sampling import SamplingFields
from slora_jax.openai.tokens import TokenTexts

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class CompletionRequest(SamplingFields):
    """The body of a `/v1/completions` request.

    Attributes:
        max_tokens: null: as many as the model's length allows, as in vLLM. 0 with `echo` scores
            the prompt and generates nothing.
        logprobs: of that many most likely tokens at each position, -1 for all; the prompt's
            positions included with `echo`.
        prompt_logprobs: the same for the prompt, in vLLM's shape.
        request_id: becomes part of the response's id.
        priority: lower goes first, under the scheduling policy "priority".
        return_tokens_as_token_ids: name tokens `token_id:N` in `logprobs`.
    """

    model: str
    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="a string, a list of token ids, or a list of either"
    )
    max_tokens: int | None = 16
    best_of: int | None = None
    echo: bool = False
    stream: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True
    request_id: str | None = None
    priority: int = 0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

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
    def scores_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    def sampling_params(self, choice: int = 0) -> SamplingParams:
        """What the engine is asked for the `choice`-th answer to a prompt.

        Raises:
            RequestError: a value is out of its range.
        """
        overrides: dict[str, Any] = {}
        if self.scores_only:  # the engine samples at least one token, which nobody gets to see
            overrides = {"max_tokens": 1, "min_tokens": 0}
        if self.echo:
            overrides["prompt_logprobs"] = _most(self.logprobs, self.prompt_logprobs)
        return self._sampling_params(choice, **overrides)


def _most(*asked: int | None) -> int | None:
    """The number of log-probabilities that covers all that was asked for; -1 is all."""
    numbers = [k for k in asked if k is not None]
    return -1 if -1 in numbers else max(numbers, default=None)


class CompletionLogprobs(BaseModel):
    """OpenAI's shape: one entry a position in each list; null for the prompt's first token.

    Attributes:
        text_offset: where the token's text begins in the choice's text, in characters.
        top_logprobs: the most likely tokens, and the one that is there. `TokenTexts.names` says
            what tokens are called.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(BaseModel):
    """One candidate for a position of the prompt, in vLLM's shape."""

    logprob: float
    rank: int
    decoded_token: str | None


class CompletionChoice(BaseModel):
    """One answer to one prompt. The last three are absent unless they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    """Tokens in and out. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """The body of a response."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage

    def to_json(self) -> str:
        """Without the fields that were not asked for."""
        return self.model_dump_json(exclude_unset=True)


def completion_response(
    request: CompletionRequest, outputs: Sequence[RequestOutput], texts: TokenTexts
) -> CompletionResponse:
    """The response to a request whose choices are all finished.

    Args:
        request: what was asked.
        outputs: prompt by prompt, `n` of each, as made with `request.sampling_params(choice)`.
        texts: of the model's tokens.
    """
    if request.scores_only:
        outputs = [_without_generated(output) for output in outputs]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs[:: request.n])
    completion_tokens = sum(len(output.token_ids) for output in outputs)
    return CompletionResponse(
        id=f"cmpl-{request.request_id or uuid.uuid4().hex}",
        object="text_completion",
        created=int(time.time()),
        model=request.model,
        choices=[_choice(request, i, output, texts) for i, output in enumerate(outputs)],
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
    )


def _without_generated(output: RequestOutput) -> RequestOutput:
    logprobs = None if output.logprobs is None else []
    return replace(
        output,
        token_ids=[],
        text="",
        logprobs=logprobs,
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
    )


def _choice(
    request: CompletionRequest, index: int, output: RequestOutput, texts: TokenTexts
) -> CompletionChoice:
    assert output.finish_reason is not None
    echoed = _echoed_text(request, index, output, texts) if request.echo else ""
    extras: dict[str, Any] = {}
    if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
        extras["prompt_logprobs"] = _prompt_logprobs(request.prompt_logprobs, output, texts)
    if request.return_token_ids:
        extras["prompt_token_ids"] = output.prompt_token_ids
        extras["token_ids"] = output.token_ids
    return CompletionChoice(
        index=index,
        text=echoed + output.text,
        logprobs=_logprobs(request, output, echoed, texts),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        **extras,
    )


def _echoed_text(
    request: CompletionRequest, index: int, output: RequestOutput, texts: TokenTexts
) -> str:
    prompt = request.prompts[index // request.n]
    if isinstance(prompt, str):
        return prompt
    return texts.decode(prompt, skip_special_tokens=request.skip_special_tokens)


def _logprobs(
    request: CompletionRequest, output: RequestOutput, echoed: str, texts: TokenTexts
) -> CompletionLogprobs | None:
    """Of the output, and with `echo` of the prompt before it."""
    if request.logprobs is None:
        return None
    prompt, skip = output.prompt_token_ids, request.skip_special_tokens
    tokens, positions = list(output.token_ids), list(output.logprobs or [])
    offsets = [
        len(echoed) + min(offset, len(output.text))  # a stop string has cut the text
        for offset in texts.offsets(tokens, prompt, skip_special_tokens=skip)
    ]
    if request.echo:
        before = texts.offsets(prompt, [], skip_special_tokens=skip)
        offsets = [min(offset, len(echoed)) for offset in before] + offsets
        tokens = prompt + tokens
        positions = [*(output.prompt_logprobs or []), *positions]
    found = CompletionLogprobs(text_offset=offsets, token_logprobs=[], tokens=[], top_logprobs=[])
    for token, position in zip(tokens, positions, strict=True):
        shown = _shown(position or {}, token, request.logprobs)
        names = texts.names([token, *shown], request.return_tokens_as_token_ids)
        values = {names[candidate]: _finite(entry) for candidate, entry in shown.items()}
        found.tokens.append(names[token])
        found.token_logprobs.append(values.get(names[token]))
        found.top_logprobs.append(values or None)
    return found


def _prompt_logprobs(
    k: int, output: RequestOutput, texts: TokenTexts
) -> list[dict[int, PromptLogprob] | None]:
    def entries(position: PositionLogprobs, token: int) -> dict[int, PromptLogprob]:
        return {
            candidate: PromptLogprob(
                logprob=_finite(entry), rank=entry.rank, decoded_token=texts.text(candidate)
            )
            for candidate, entry in _shown(position, token, k).items()
        }

    positions = output.prompt_logprobs or []
    return [
        None if position is None else entries(position, token)
        for token, position in zip(output.prompt_token_ids, positions, strict=True)
    ]


def _shown(position: PositionLogprobs, token: int, k: int) -> Mapping[int, Logprob]:
    """The `k` most likely candidates and `token`: the engine may have been asked for more."""
    if k == -1:
        return position
    return {i: entry for i, entry in position.items() if entry.rank <= k or i == token}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST_LOGPROB)
