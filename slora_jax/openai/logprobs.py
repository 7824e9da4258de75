# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as responses show them.

There may be a hundred thousand entries in a response: they are plain dicts, which cost little.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from pydantic import BaseModel

from slora_jax.core import Logprob, PositionLogprobs, RequestOutput
from slora_jax.openai.tokens import TokenOffsets, TokenTexts

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


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


class ChatTokenLogprob(TypedDict):
    """One token, and its own bytes: those of several tokens may make one character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatPositionLogprobs(ChatTokenLogprob):
    """The token at one position, and the most likely ones there."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """OpenAI's shape for chat completions: one entry a position."""

    content: list[ChatPositionLogprobs]


class PromptLogprob(TypedDict):
    """One candidate for a position of the prompt, in vLLM's shape."""

    logprob: float
    rank: int
    decoded_token: str | None


type PromptLogprobs = list[dict[int, PromptLogprob] | None]


def completion_logprobs(
    tokens: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    offsets: Sequence[int],
    k: int,
    texts: TokenTexts,
    *,
    as_ids: bool,
) -> CompletionLogprobs:
    """One entry for each of `tokens`.

    Args:
        tokens: those that are there.
        positions: the candidates of each.
        offsets: where their texts begin.
        k: how many of the most likely ones to show; -1: all.
        texts: of the model's tokens.
        as_ids: name tokens `token_id:N`.
    """
    found = CompletionLogprobs(
        text_offset=list(offsets), token_logprobs=[], tokens=[], top_logprobs=[]
    )
    for token, position in zip(tokens, positions, strict=True):
        shown = _shown(position or {}, token, k)
        names = texts.names([token, *shown], as_ids)
        values = {names[candidate]: _finite(entry) for candidate, entry in shown.items()}
        found.tokens.append(names[token])
        found.token_logprobs.append(values.get(names[token]))
        found.top_logprobs.append(values or None)
    return found


def completion_offsets(output: RequestOutput, offsets: TokenOffsets, echoed: int) -> Iterator[int]:
    """Where the texts of an output's new tokens begin, after so many echoed characters."""
    for offset in offsets.append(output.new_token_ids):
        # A stop string has cut the text, perhaps before these tokens.
        yield echoed + (min(offset, len(output.text)) if output.finished else offset)


def chat_logprobs(
    tokens: Sequence[int],
    positions: Sequence[PositionLogprobs],
    k: int,
    texts: TokenTexts,
    *,
    as_ids: bool,
) -> ChatLogprobs:
    """One entry for each of `tokens`; the arguments are those of `completion_logprobs`."""

    def entry(token: int, name: str, one: Logprob) -> ChatTokenLogprob:
        return {"token": name, "logprob": _finite(one), "bytes": texts.own_bytes(token)}

    found = ChatLogprobs(content=[])  # filled afterwards: pydantic would check it in one piece
    for token, position in zip(tokens, positions, strict=True):
        names = texts.names([token, *position], as_ids)
        top = [entry(i, names[i], one) for i, one in position.items() if k == -1 or one.rank <= k]
        one = entry(token, names[token], position[token])
        found.content.append({**one, "top_logprobs": top})
    return found


def prompt_logprobs(k: int, output: RequestOutput, texts: TokenTexts) -> PromptLogprobs:
    """The `k` most likely candidates for each position of the prompt, and the one there."""

    def entries(position: PositionLogprobs, token: int) -> dict[int, PromptLogprob]:
        return {
            candidate: {
                "logprob": _finite(entry),
                "rank": entry.rank,
                "decoded_token": texts.text(candidate),
            }
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
