# SPDX-License-Identifier: Apache-2.0
"""What a completion's response holds, from outputs that are written here."""

import json

import pytest

from slora_jax.core import FinishReason, Logprob, RequestOutput
from slora_jax.demo import BASE_MODEL
from slora_jax.openai.completions import CompletionReply, CompletionRequest
from slora_jax.openai.tokens import TokenTexts
from slora_jax.tokenizer import load_tokenizer

BEGIN, SEP, END = 256, 257, 258


def parse(**fields) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hi"} | fields)


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(load_tokenizer(BASE_MODEL))


def output(prompt: list[int], tokens: list[int], text: str = "", **fields) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        adapter=None,
        prompt_token_ids=prompt,
        token_ids=tokens,
        text=text,
        new_token_ids=[],
        new_text="",
        finish_reason=FinishReason.LENGTH,
        **fields,
    )


def position(*tokens: int, chosen: int | None = None, rank: int = 9) -> dict[int, Logprob]:
    """Candidates, most likely first, and perhaps a less likely one that was chosen."""
    entries = {token: Logprob(-0.5 * i, i + 1) for i, token in enumerate(tokens)}
    return entries if chosen is None else entries | {chosen: Logprob(-7.0, rank)}


def respond(request: CompletionRequest, texts: TokenTexts, *outputs: RequestOutput) -> dict:
    return json.loads(CompletionReply(request, "made-up", texts).response(outputs).to_json())


def test_response(texts):
    request = parse(request_id="7", n=2, prompt=["a", "bc"])
    outputs = [
        output([1, 2], [3], "x"),
        output([1, 2], [3, 4], "xy"),
        output([5], [6], "z", stop_reason="!"),
        output([5], [6], "z"),
    ]
    got = respond(request, texts, *outputs)
    assert got.pop("created") > 0
    common = {"logprobs": None, "finish_reason": "length"}
    assert got == {
        "id": "cmpl-7",
        "object": "text_completion",
        "model": "m",
        "choices": [
            {"index": 0, "text": "x", "stop_reason": None, **common},
            {"index": 1, "text": "xy", "stop_reason": None, **common},
            {"index": 2, "text": "z", "stop_reason": "!", **common},
            {"index": 3, "text": "z", "stop_reason": None, **common},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def test_token_ids_on_request(texts):
    got = respond(parse(return_token_ids=True), texts, output([1, 2], [3], "x"))
    assert got["choices"][0]["token_ids"] == [3]
    assert got["choices"][0]["prompt_token_ids"] == [1, 2]


def test_logprobs_are_trimmed_to_what_was_asked(texts):
    """The engine gives one number of candidates to `prompt_logprobs` and to `echo`."""
    request = parse(prompt=[97, 98], echo=True, logprobs=1, prompt_logprobs=2)
    prompt_logprobs = [None, position(99, 100, chosen=98)]
    found = output(
        [97, 98], [99], "c", prompt_logprobs=prompt_logprobs, logprobs=[position(100, chosen=99)]
    )
    choice = respond(request, texts, found)["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -7.0, -7.0],
        "top_logprobs": [None, {"c": 0.0, "b": -7.0}, {"d": 0.0, "c": -7.0}],
        "text_offset": [0, 1, 2],
    }
    assert choice["prompt_logprobs"] == [
        None,
        {
            "99": {"logprob": 0.0, "rank": 1, "decoded_token": "c"},
            "100": {"logprob": -0.5, "rank": 2, "decoded_token": "d"},
            "98": {"logprob": -7.0, "rank": 9, "decoded_token": "b"},
        },
    ]


def test_all_logprobs(texts):
    found = output([97], [98], "b", logprobs=[position(*range(60, 100))])
    choice = respond(parse(logprobs=-1), texts, found)["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 40


def test_infinity_is_a_number_in_json(texts):
    lowest = {98: Logprob(float("-inf"), 1)}
    choice = respond(parse(logprobs=0), texts, output([97], [98], "b", logprobs=[lowest]))
    assert choice["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_candidates_of_one_text_are_all_there(texts):
    """Single bytes of characters all read U+FFFD; the one that was chosen keeps the text."""
    found = output([97], [195], "", logprobs=[position(200, 201, chosen=195)])
    logprobs = respond(parse(logprobs=2), texts, found)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["\N{REPLACEMENT CHARACTER}"]
    assert logprobs["top_logprobs"] == [
        {"\N{REPLACEMENT CHARACTER}": -7.0, "token_id:200": 0.0, "token_id:201": -0.5}
    ]


def test_offsets_count_characters(texts):
    """Of "é", two tokens, after a special token without text; then a stop string cuts the text."""
    prompt, tokens = [BEGIN, *"é".encode(), SEP], [*"añb!".encode(), END]
    found = output(
        prompt,
        tokens,
        "añb",
        prompt_logprobs=[None, *[position(1)] * 3],
        logprobs=[position(token) for token in tokens],
    )
    choice = respond(parse(prompt="é", echo=True, logprobs=0), texts, found)["choices"][0]
    assert choice["text"] == "éañb"
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 1, 2, 2, 3, 4, 4]


def test_scoring_generates_nothing(texts):
    request = parse(prompt=[97, 98], echo=True, logprobs=0, max_tokens=0, min_tokens=0)
    assert request.sampling_params().max_tokens == 1
    found = output(
        [97, 98], [99], "c", prompt_logprobs=[None, position(98)], logprobs=[position(9)]
    )
    got = respond(request, texts, found)
    assert got["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    choice = got["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, 0.0]


@pytest.mark.parametrize("tokenizer", [True, False])
def test_tokens_by_id(texts, tokenizer):
    request = parse(
        prompt=[97], echo=True, logprobs=1, prompt_logprobs=0, return_tokens_as_token_ids=tokenizer
    )
    found = output([97], [98], "", prompt_logprobs=[None], logprobs=[position(98)])
    choice = respond(request, texts if tokenizer else TokenTexts(None), found)["choices"][0]
    assert choice["text"] == ("a" if tokenizer else "")
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"token_id:98": 0.0}]
    assert choice["logprobs"]["text_offset"] == [0, int(tokenizer)]
