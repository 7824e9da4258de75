# SPDX-License-Identifier: Apache-2.0
"""What a chat completion's response holds, from outputs that are written here."""

import json

import pytest

from slora_jax.core import Logprob, RequestOutput
from slora_jax.demo import BASE_MODEL
from slora_jax.openai.chat import ChatCompletionRequest, ChatReply
from slora_jax.openai.tokens import TokenTexts
from slora_jax.tokenizer import load_tokenizer
from tests.openai.test_completions import output, position


def parse(**fields) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "hi"}]
    return ChatCompletionRequest.model_validate({"model": "m", "messages": messages} | fields)


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(load_tokenizer(BASE_MODEL))


def respond(request: ChatCompletionRequest, texts: TokenTexts, *outputs: RequestOutput) -> dict:
    return json.loads(ChatReply(request, "made-up", texts).response(outputs).to_json())


def entry(token: str, logprob: float) -> dict:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def test_response(texts):
    outputs = [output([1, 2], [3], "x"), output([1, 2], [3, 4], "xy", stop_reason="!")]
    got = respond(parse(request_id="7", n=2), texts, *outputs)
    assert got.pop("created") > 0
    common = {"logprobs": None, "finish_reason": "length"}
    x, xy = ({"role": "assistant", "content": text} for text in ("x", "xy"))
    assert got == {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": x, "stop_reason": None, **common},
            {"index": 1, "message": xy, "stop_reason": "!", **common},
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


def test_an_id_is_made_up_for_a_request_without_one(texts):
    assert respond(parse(), texts, output([1], [2]))["id"] == "chatcmpl-made-up"


def test_token_ids_on_request(texts):
    outputs = [output([1, 2], [3], "x"), output([1, 2], [4, 5], "yz")]
    got = respond(parse(n=2, return_token_ids=True), texts, *outputs)
    assert got["prompt_token_ids"] == [1, 2]
    assert [choice["token_ids"] for choice in got["choices"]] == [[3], [4, 5]]


def test_logprobs_have_one_entry_a_token(texts):
    found = output([1], [98, 99], "bc", logprobs=[position(98, 100), position(100, chosen=99)])
    [choice] = respond(parse(logprobs=True, top_logprobs=2), texts, found)["choices"]
    assert choice["logprobs"] == {
        "content": [
            {**entry("b", 0.0), "top_logprobs": [entry("b", 0.0), entry("d", -0.5)]},
            {**entry("c", -7.0), "top_logprobs": [entry("d", 0.0)]},
        ]
    }


@pytest.mark.parametrize(("k", "shown"), [(0, []), (1, ["a"]), (2, ["a", "b"])])
def test_top_logprobs_are_the_most_likely_only(texts, k, shown):
    """The token itself is among them only if it is one of the most likely, as in OpenAI's."""
    found = output([1], [122], "z", logprobs=[position(97, 98, 99, chosen=122)])
    [choice] = respond(parse(logprobs=True, top_logprobs=k), texts, found)["choices"]
    [one] = choice["logprobs"]["content"]
    assert one["token"] == "z"
    assert [candidate["token"] for candidate in one["top_logprobs"]] == shown


def test_all_top_logprobs(texts):
    found = output([1], [98], "b", logprobs=[position(*range(60, 100))])
    [choice] = respond(parse(logprobs=True, top_logprobs=-1), texts, found)["choices"]
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 40


def test_logprobs_only_on_request(texts):
    found = output([1], [98], "b", logprobs=[position(98)])
    assert respond(parse(), texts, found)["choices"][0]["logprobs"] is None


def test_infinity_is_a_number_in_json(texts):
    found = output([1], [98], "b", logprobs=[{98: Logprob(float("-inf"), 1)}])
    [choice] = respond(parse(logprobs=True), texts, found)["choices"]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


def test_candidates_of_one_text_have_names_of_their_own(texts):
    found = output([1], [195], "", logprobs=[position(195, 200)])
    [choice] = respond(parse(logprobs=True, top_logprobs=2), texts, found)["choices"]
    [one] = choice["logprobs"]["content"]
    half = {**entry("\N{REPLACEMENT CHARACTER}", 0.0), "bytes": [195]}
    other = {**entry("token_id:200", -0.5), "bytes": [200]}
    assert one == {**half, "top_logprobs": [half, other]}


def test_bytes_of_tokens_put_together_are_the_text(texts):
    """A token may be a part of a character; its bytes are its own."""
    tokens = [*"é😊".encode()]
    found = output([1], tokens, "é😊", logprobs=[position(token) for token in tokens])
    [choice] = respond(parse(logprobs=True), texts, found)["choices"]
    found = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
    assert found.decode() == "é😊"


@pytest.mark.parametrize("tokenizer", [True, False])
def test_tokens_by_id(texts, tokenizer):
    request = parse(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=tokenizer)
    found = output([1], [98], "", logprobs=[position(98)])
    [choice] = respond(request, texts if tokenizer else TokenTexts(None), found)["choices"]
    [one] = choice["logprobs"]["content"]
    b = {**entry("token_id:98", 0.0), "bytes": [98] if tokenizer else None}
    assert one == {**b, "top_logprobs": [b]}


def test_prompt_logprobs_are_the_responses(texts):
    """They are the same for all choices; the engine may give more candidates than asked for."""
    found = output([97, 98], [99], "c", prompt_logprobs=[None, position(99, 100, chosen=98)])
    got = respond(parse(n=2, prompt_logprobs=1), texts, found, found)
    assert got["prompt_logprobs"] == [
        None,
        {
            "99": {"logprob": 0.0, "rank": 1, "decoded_token": "c"},
            "98": {"logprob": -7.0, "rank": 9, "decoded_token": "b"},
        },
    ]
    assert all("prompt_logprobs" not in choice for choice in got["choices"])


def test_a_prompt_counts_once(texts):
    outputs = [output([1, 2, 3], [4] * length) for length in (1, 2, 5)]
    assert respond(parse(n=3), texts, *outputs)["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
    }
