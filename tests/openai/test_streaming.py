# SPDX-License-Identifier: Apache-2.0
"""The chunks of a stream, put together, are the whole response, wherever outputs are cut."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.core import FinishReason, Logprob, PositionLogprobs, RequestOutput
from slora_jax.demo import BASE_MODEL
from slora_jax.openai.chat import ChatCompletionRequest, ChatReply
from slora_jax.openai.completions import CompletionReply, CompletionRequest
from slora_jax.openai.tokens import TokenTexts
from slora_jax.tokenizer import Detokenizer, load_tokenizer

BEGIN, SEP, END = 256, 257, 258
TOKENIZER = load_tokenizer(BASE_MODEL)
assert TOKENIZER is not None
TEXTS = TokenTexts(TOKENIZER)
MOST = 3  # candidates for each position

EXAMPLES = settings(max_examples=150)

# Whole characters of one to four bytes, and any bytes at all: a token is a byte.
BYTES = st.text("ab é漢🙂", max_size=6).map(lambda text: list(text.encode()))
TOKENS = st.one_of(BYTES, st.lists(st.sampled_from([*"aé漢🙂".encode(), SEP]), max_size=8))


@dataclass(frozen=True)
class Stream:
    """Outputs of `n` choices for each prompt, in the order in which they come."""

    pieces: list[tuple[int, RequestOutput]]

    def last(self) -> list[RequestOutput]:
        """The last output of each choice."""
        return [output for _, output in sorted(dict(self.pieces).items())]


def candidates(token: int, at: int) -> PositionLogprobs:
    """Most likely tokens, and the one that is there."""
    found = {(token + i * i + at) % 256: Logprob(-0.5 * i, i + 1) for i in range(1, MOST + 1)}
    return found if token in found else {**found, token: Logprob(-7.0 - at, 9)}


def texts_of(tokens: Sequence[int], prompt: Sequence[int], skip: bool, held: int) -> list[str]:
    """The text after each token; `held` characters come late, as with stop strings."""
    detokenizer = Detokenizer(TOKENIZER, prompt, skip)
    found = list(itertools.accumulate(detokenizer.append(one) for one in tokens if one != END))
    found.extend(found[-1:] or [""] if END in tokens else [])
    last = found[-1] + detokenizer.flush()
    return [*(text[: max(len(text) - held, 0)] for text in found[:-1]), last]


@st.composite
def cut_outputs(draw, prompt: list[int], skip: bool) -> list[RequestOutput]:
    """One choice's outputs: each has all that came before, and what is new."""
    ends = draw(st.booleans())
    tokens = [*(draw(TOKENS) or [97]), *([END] if ends else [])]
    texts = texts_of(tokens, prompt, skip, draw(st.integers(0, 2)))
    cuts = {cut for cut in draw(st.sets(st.integers(1, 24))) if cut < len(tokens)}
    ends_at = [*sorted(cuts), len(tokens)]
    if draw(st.booleans()):
        ends_at.append(len(tokens))  # an end without a token, as of what is aborted
    outputs, start, shown = [], 0, ""
    for piece, end in enumerate(ends_at, 1):
        finished = piece == len(ends_at)
        text = texts[end - 1]
        outputs.append(
            RequestOutput(
                request_id="r",
                adapter=None,
                prompt_token_ids=prompt,
                token_ids=tokens[:end],
                text=text,
                new_token_ids=tokens[start:end],
                new_text=text.removeprefix(shown),
                finish_reason=FinishReason.STOP if finished else None,
                stop_reason="!" if finished and ends else None,
                logprobs=[candidates(token, at) for at, token in enumerate(tokens[:end])],
                prompt_logprobs=[None, *map(candidates, prompt[1:], range(len(prompt)))],
            )
        )
        start, shown = end, text
    return outputs


@st.composite
def streams(draw, prompts: list[list[int]], n: int, skip: bool) -> Stream:
    """Choices whose outputs come in any order, each one's own in theirs."""
    choices = [draw(cut_outputs(prompt, skip)) for prompt in prompts for _ in range(n)]
    turns = draw(st.permutations([i for i, outputs in enumerate(choices) for _ in outputs]))
    left = [iter(outputs) for outputs in choices]
    return Stream([(i, next(left[i])) for i in turns])


def common_fields() -> dict[str, st.SearchStrategy[Any]]:
    return {
        "n": st.integers(1, 3),
        "skip_special_tokens": st.booleans(),
        "prompt_logprobs": st.sampled_from([None, 0, 1, -1]),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        "stream": st.just(True),
        "stream_options": st.sampled_from(
            [
                None,
                {"include_usage": True},
                {"include_usage": True, "continuous_usage_stats": True},
            ]
        ),
        "request_id": st.just("7"),
    }


COMPLETIONS = st.fixed_dictionaries(
    {
        **common_fields(),
        "model": st.just("m"),
        "prompt": st.one_of(
            st.text("a é🙂", max_size=4),
            st.lists(st.text("a é🙂", max_size=4), min_size=1, max_size=2),
            st.lists(TOKENS.map(lambda tokens: [BEGIN, *tokens]), min_size=1, max_size=2),
        ),
        "echo": st.booleans(),
        "logprobs": st.sampled_from([None, 0, 2, -1]),
        "max_tokens": st.sampled_from([0, 99]),
    }
).filter(lambda body: body["echo"] or body["max_tokens"])
CHATS = st.builds(
    lambda body, logprobs: body | logprobs,
    st.fixed_dictionaries(
        {
            **common_fields(),
            "model": st.just("m"),
            "messages": st.just([{"role": "user", "content": "hi"}]),
        }
    ),
    st.sampled_from([{}, *({"logprobs": True, "top_logprobs": k} for k in (0, 2, -1))]),
)


def tokens_of(prompt: str | list[int]) -> list[int]:
    return [BEGIN, *prompt.encode()] if isinstance(prompt, str) else prompt


def body_of(reply_body: Any) -> dict[str, Any]:
    """As a client reads it, less what the clock says."""
    body = json.loads(reply_body.to_json())
    assert body.pop("created") > 0
    return body


def put_together(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One choice from its pieces: texts and lists in a row; the rest is there once."""
    whole: dict[str, Any] = {}
    for piece in pieces:
        for name, value in piece.items():
            there = whole.get(name)
            if name == "index" or there is None:
                whole[name] = value
            elif isinstance(there, dict):
                whole[name] = put_together([there, value])
            elif value is not None:
                assert name not in ("finish_reason", "role"), f"{name} came twice"
                whole[name] = there + value
    return whole


def check_ends(pieces: Sequence[dict[str, Any]]) -> None:
    """Only the last chunk of a choice says why it ends."""
    *before, last = pieces
    assert last["finish_reason"] is not None
    assert all(piece["finish_reason"] is piece["stop_reason"] is None for piece in before)


def check_usage(
    chunks: Sequence[tuple[int, RequestOutput, dict[str, Any]]], *, continuous: bool, hidden: bool
) -> None:
    """Every chunk says how far its choice has come, or none does."""
    for _, output, chunk in chunks:
        if continuous:
            given, made = len(output.prompt_token_ids), 0 if hidden else len(output.token_ids)
            assert chunk["usage"] == {
                "prompt_tokens": given,
                "completion_tokens": made,
                "total_tokens": given + made,
            }
        else:
            assert "usage" not in chunk


def chunks_of(
    reply: CompletionReply | ChatReply, stream: Stream
) -> list[tuple[int, RequestOutput, dict[str, Any]]]:
    return [
        (index, output, body_of(chunk))
        for index, output in stream.pieces
        for chunk in reply.chunks(index, output)
    ]


def choices_of(
    chunks: Sequence[tuple[int, RequestOutput, dict[str, Any]]], head: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    """The pieces of each choice. Every chunk has the response's head and one choice."""
    pieces: dict[int, list[dict[str, Any]]] = {}
    for index, _, chunk in chunks:
        assert {name: chunk[name] for name in head} == head
        [choice] = chunk["choices"]
        assert choice["index"] == index
        pieces.setdefault(index, []).append(choice)
    return [found for _, found in sorted(pieces.items())]


@given(st.data())
@EXAMPLES
def test_chunks_of_a_completion_are_its_response(data):
    request = CompletionRequest.model_validate(data.draw(COMPLETIONS))
    prompts = [tokens_of(prompt) for prompt in request.prompts]
    stream = data.draw(streams(prompts, request.n, request.skip_special_tokens))
    if request.scores_only:  # the engine gives one token, at once
        stream = Stream([(i, output) for i, output in enumerate(stream.last())])
    whole = body_of(CompletionReply(request, "", TEXTS).response(stream.last()))
    reply = CompletionReply(request, "", TEXTS)
    chunks = chunks_of(reply, stream)

    head = {"id": "cmpl-7", "object": "text_completion", "model": "m"}
    choices = choices_of(chunks, head)
    assert {**head, "choices": [put_together(one) for one in choices]} == {
        name: value for name, value in whole.items() if name != "usage"
    }
    for first, *others in choices:
        check_ends([first, *others])
        assert ("prompt_token_ids" in first) == request.return_token_ids
        assert ("prompt_logprobs" in first) == (request.prompt_logprobs is not None)
        assert not any({"prompt_token_ids", "prompt_logprobs"} & piece.keys() for piece in others)
    check_usage(chunks, continuous=request.includes_continuous_usage, hidden=request.scores_only)
    assert body_of(reply.usage_chunk()) == {**head, "choices": [], "usage": whole["usage"]}


@given(st.data())
@EXAMPLES
def test_chunks_of_a_chat_completion_are_its_response(data):
    request = ChatCompletionRequest.model_validate(data.draw(CHATS))
    prompt = [BEGIN, *data.draw(TOKENS), SEP]
    stream = data.draw(streams([prompt], request.n, request.skip_special_tokens))
    whole = body_of(ChatReply(request, "", TEXTS).response(stream.last()))
    reply = ChatReply(request, "", TEXTS)
    chunks = chunks_of(reply, stream)

    head = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "model": "m"}
    choices = choices_of(chunks, head)
    for choice, pieces in zip(whole["choices"], choices, strict=True):
        choice["delta"] = choice.pop("message")
        assert put_together(pieces) == choice
        check_ends(pieces)
        roles = [piece["delta"].get("role") for piece in pieces]
        assert roles == ["assistant"] + [None] * (len(pieces) - 1)
        assert pieces[0]["delta"]["content"] == ""
        assert ["role" in piece["delta"] for piece in pieces[1:]] == [False] * (len(pieces) - 1)
    about_prompt = {"prompt_token_ids", "prompt_logprobs"}
    _, _, first = chunks[0]
    assert {name: first[name] for name in about_prompt & first.keys()} == {
        name: whole[name] for name in about_prompt & whole.keys()
    }
    assert not any(about_prompt & chunk.keys() for _, _, chunk in chunks[1:])
    check_usage(chunks, continuous=request.includes_continuous_usage, hidden=False)
    assert body_of(reply.usage_chunk()) == {**head, "choices": [], "usage": whole["usage"]}


def stopped(tokens: str, text: str, sizes: Sequence[int]) -> Stream:
    """One choice whose text ends before its tokens do: a stop string is cut off."""
    ends = list(itertools.accumulate(sizes))
    ids = list(tokens.encode())
    outputs, start, shown = [], 0, ""
    for end in ends:
        finished = end == ends[-1]
        so_far = text if finished else text[:end]
        outputs.append(
            RequestOutput(
                request_id="r",
                adapter=None,
                prompt_token_ids=[BEGIN],
                token_ids=ids[:end],
                text=so_far,
                new_token_ids=ids[start:end],
                new_text=so_far.removeprefix(shown),
                finish_reason=FinishReason.STOP if finished else None,
                stop_reason="stop" if finished else None,
                logprobs=[candidates(token, at) for at, token in enumerate(ids[:end])],
            )
        )
        start, shown = end, so_far
    return Stream([(0, output) for output in outputs])


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 4]])
def test_offsets_of_a_stop_string_are_at_the_texts_end(sizes):
    request = CompletionRequest(model="m", prompt="", logprobs=0, stop=["stop"], stream=True)
    stream = stopped("abstop", "ab", sizes)
    chunks = chunks_of(CompletionReply(request, "", TEXTS), stream)
    [choice] = map(put_together, choices_of(chunks, {}))
    assert choice["text"] == "ab"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 2, 2]
    assert choice["stop_reason"] == "stop"


def test_offsets_that_are_out_stay_out():
    """Whether a stop string will be one is not known when its first tokens are sent."""
    request = CompletionRequest(model="m", prompt="", logprobs=0, stop=["stop"], stream=True)
    stream = stopped("abstop", "ab", [2, 3, 1])
    chunks = chunks_of(CompletionReply(request, "", TEXTS), stream)
    [choice] = map(put_together, choices_of(chunks, {}))
    assert choice["text"] == "ab"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 2]
