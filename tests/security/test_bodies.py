# SPDX-License-Identifier: Apache-2.0
"""Bodies that cost more than they weigh: what is in them is judged before work is done."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.bodies import JsonValues
from server.writing import is_large, json_pieces
from slora_jax.core import FinishReason, Logprob, RequestOutput, SamplingParams
from slora_jax.demo import BASE_MODEL
from slora_jax.openai.chat import ChatCompletionRequest, ChatReply
from slora_jax.openai.completions import CompletionReply, CompletionRequest
from slora_jax.openai.tokens import TokenTexts
from slora_jax.tokenizer import load_tokenizer
from tests.server.fake_engine import ANSWER
from tests.server.test_front_end import World, error, run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def values(found: Any) -> int:
    """Keys and values; an empty array or object counts for two."""
    if isinstance(found, list):
        return 1 + (sum(map(values, found)) if found else 1)
    if isinstance(found, dict):
        return 1 + (sum(1 + values(one) for one in found.values()) if found else 1)
    return 1


@given(JSON, st.booleans(), st.lists(st.integers(1, 30), max_size=20))
@example('"\\', False, [1, 1, 1])
@example(['\\"', ",[{"], False, [3, 1, 1, 1, 1])
@example("\\\\", True, [2, 1, 1])
def test_values_are_counted_however_they_arrive(found, escaped, sizes):
    data = json.dumps(found, ensure_ascii=escaped).encode()
    counter, count = JsonValues(), 1
    for size in sizes:
        count = counter.feed(data[:size])
        data = data[size:]
    count = counter.feed(data) if data else count
    assert count == values(found)


@given(st.binary(max_size=200), st.integers(1, 20))
def test_what_is_no_json_is_counted_too(data, size):
    counter = JsonValues()
    for start in range(0, len(data), size):
        counter.feed(data[start : start + size])


@pytest.mark.parametrize("unit", [b'"', b'\\"', b'"\\', b'"\\"', b"\\", b'",', b"[", b'"a\\\\"'])
def test_counting_takes_linear_time(unit):
    """A quadratic pattern would take minutes."""
    piece = unit * (2**18 // len(unit))
    began = time.process_time()
    counter = JsonValues()
    for _ in range(8):
        counter.feed(piece)
    assert time.process_time() - began < 8


@pytest.mark.parametrize(
    ("fields", "param", "option"),
    [
        ({"stop": ["x"] * 65}, "stop", "--max-stop-strings"),
        ({"stop": "x" * 1025}, "stop", "--max-stop-chars"),
        ({"stop": ["x", "x" * 1025]}, "stop", "--max-stop-chars"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "--max-stop-token-ids"),
        ({"prompt": [[ANSWER]] * 2049}, "prompt", "--max-prompts"),
        ({"messages": [{"role": "user", "content": ""}] * 4097}, "messages", "--max-messages"),
        ({"prompt": [ANSWER] * 300_000}, None, "--max-body-values"),
        ({"prompt": [[]] * 200_000}, None, "--max-body-values"),
        ({f"k{n}": 0 for n in range(200_000)}, None, "--max-body-values"),
        ({"chat_template_kwargs": {f"k{n}": 0 for n in range(200_000)}}, None, "--max-body"),
        ({"user": [[[["a"] * 25] * 25] * 25] * 25}, None, "--max-body"),
    ],
    ids=[
        "stops",
        "stop",
        "stop_of_two",
        "stop_ids",
        "prompts",
        "messages",
        "ids",
        "lists",
        "fields",
        "variables",
        "nested",
    ],
)
def test_more_than_anybody_needs(fields, param, option):
    async def story(one: World) -> None:
        route = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        body = {"model": "base", "prompt": [ANSWER], "max_tokens": 3} | fields
        response = await one.client.post(route, json=body)
        assert response.status_code == 400
        assert option in error(response)["message"]
        assert error(response)["param"] == param

    run(story, max_queued_requests=5000)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 64},
        {"stop_token_ids": [1] * 1024},
        {"prompt": [[ANSWER]] * 2048},
        {"unknown": {"a" * 1000: ["[{,:" * 100_000]}},
    ],
    ids=["stops", "stop_ids", "prompts", "unknown"],
)
def test_as_much_as_is_allowed(fields):
    async def story(one: World) -> None:
        assert (await one.ask(**fields)).status_code == 200

    run(story, max_queued_requests=2048)


def test_parameters_are_sent_once_for_all_choices(monkeypatch):
    async def story(one: World) -> None:
        sent = []
        send = one.front.client._send
        monkeypatch.setattr(one.front.client, "_send", lambda m: (sent.append(m), send(m)))
        assert (await one.ask(n=8, seed=5, stop=["a"] * 60)).status_code == 200
        [generate] = [m for m in sent if type(m).__name__ == "Generate"]
        assert len(generate.ids) == 8
        assert isinstance(generate.params, SamplingParams)
        assert generate.params.of_choice(7).seed == 12

    run(story)


@pytest.mark.parametrize(
    ("fields", "in_thread"),
    [
        ({}, False),
        ({"messages": [{"role": "user", "content": ""}] * 1000}, True),
        ({"chat_template_kwargs": {"x": ["a"] * 1000}}, True),
    ],
    ids=["short", "many empty messages", "variables"],
)
def test_what_takes_a_template_long_does_not_hold_up_the_loop(monkeypatch, fields, in_thread):
    async def story(one: World) -> None:
        found = []
        tokenizer = one.front.prompts.need_tokenizer()
        chat_text = tokenizer.chat_text

        def watched(*rest: Any, **more: Any) -> str:
            found.append(threading.current_thread() is not threading.main_thread())
            return chat_text(*rest, **more)

        monkeypatch.setattr(tokenizer, "chat_text", watched)
        body = {"model": "base", "messages": [{"role": "user", "content": "a"}]} | fields
        for path in ("/v1/chat/completions", "/tokenize"):
            assert (await one.client.post(path, json=body)).status_code == 200
        assert found == [in_thread] * 2

    run(story)


def test_a_long_text_is_refused_before_it_is_tokenized(monkeypatch):
    """As many characters are looked at as its limit of tokens has, not all of them."""

    async def story(one: World) -> None:
        seen = []
        inner = one.front.prompts.need_tokenizer()
        encode = inner.encode

        def watched(text: str, *rest: Any, **more: Any) -> list[int]:
            seen.append(len(text))
            return encode(text, *rest, **more)

        monkeypatch.setattr(inner, "encode", watched)
        text = "hello wor " * 1_000_000
        body = {"model": "base", "messages": [{"role": "user", "content": text}]}
        for response in (
            await one.ask(prompt=text),
            await one.client.post("/v1/chat/completions", json=body),
        ):
            assert response.status_code == 400
            assert "max_model_len 64" in error(response)["message"]
        assert sum(seen) < 100_000
        response = await one.client.post("/tokenize", json={"prompt": text})
        assert "65536 tokens" in error(response)["message"]
        assert sum(seen) < 400_000
        found = await one.client.post("/tokenize", json={"prompt": text[:60_000]})
        assert found.json()["count"] == len(encode(text[:60_000]))
        tokens = [104] * 65_537
        response = await one.client.post("/detokenize", json={"tokens": tokens})
        assert "65536 is the most" in error(response)["message"]
        response = await one.client.post("/detokenize", json={"tokens": tokens[1:]})
        assert response.json()["prompt"] == "h" * 65_536

    run(story)


@given(st.text(min_size=0, max_size=300), st.integers(1, 40))
def test_what_is_called_too_long_is(text, most):
    tokenizer = load_tokenizer(BASE_MODEL)
    assert tokenizer is not None
    for repeated in (text, text * (40_000 // max(len(text), 1))):
        if tokenizer.is_longer(repeated, most * 100):
            assert len(tokenizer.encode(repeated, add_special_tokens=False)) > most * 100


def output(prompt: int, tokens: int, candidates: int) -> RequestOutput:
    def position(token: int) -> dict[int, Logprob]:
        return {(token + n) % 250: Logprob(-0.5 * n, n + 1) for n in range(candidates)}

    ids = [n % 250 for n in range(prompt)]
    out = [n % 250 for n in range(tokens)]
    return RequestOutput(
        request_id="x",
        adapter=None,
        prompt_token_ids=ids,
        token_ids=out,
        text="é" * tokens,
        new_token_ids=out,
        new_text="é" * tokens,
        finish_reason=FinishReason.LENGTH,
        logprobs=[position(token) for token in out],
        prompt_logprobs=[None, *map(position, ids[1:])],
    )


@pytest.mark.parametrize("prompt", [1, 3, 256, 257, 700])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_pieces_are_the_same_json(api, prompt):
    texts = TokenTexts(load_tokenizer(BASE_MODEL))
    outputs = [output(prompt, 300, 4), output(prompt, 2, 4)]
    fields = {"model": "m", "n": 2, "prompt_logprobs": 3, "return_token_ids": True}
    if api == "chat":
        messages = [{"role": "user", "content": "a"}]
        request = ChatCompletionRequest(messages=messages, logprobs=True, top_logprobs=2, **fields)
        reply = ChatReply(request, "id", texts)
    else:
        request = CompletionRequest(prompt="a", echo=True, logprobs=2, **fields)
        reply = CompletionReply(request, "id", texts)
    body = reply.response(outputs)
    whole = body.model_dump_json(exclude_unset=True)
    pieces = list(json_pieces(body))
    assert b"".join(pieces).decode() == whole
    assert max(map(len, pieces)) < 100_000
    assert is_large(outputs, whole=True)
    assert not is_large([output(3, 2, 4)], whole=True)


def test_long_replies_do_not_hold_up_the_loop():
    """Written in a thread while others get their turn: log-probabilities of 8000 positions."""
    from server.writing import write

    texts = TokenTexts(load_tokenizer(BASE_MODEL))
    found = output(8000, 1, 21)
    request = CompletionRequest(model="m", prompt="a", prompt_logprobs=20)

    async def story() -> int:
        reply = CompletionReply(request, "id", texts)
        with ThreadPoolExecutor(1) as threads:
            writing = asyncio.ensure_future(write(lambda: [reply.response([found])], threads))
            turns = 0
            while not writing.done():
                turns += 1
                await asyncio.sleep(0)
        assert len(await writing) > 1_000_000
        return turns

    assert asyncio.run(story()) > 20
