# SPDX-License-Identifier: Apache-2.0
"""What a completion request may say, what the engine is asked for, and which error it gets."""

import json

import pytest

from slora_jax.core import RequestError, SamplingParams
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.errors import ErrorResponse, UnknownModelError, parse_body

# Each with its neutral value and one that would change the result.
REFUSED = [
    ("suffix", "", "x"),
    ("best_of", 1, 2),
    ("logit_bias", {}, {"5": 1}),
    ("response_format", {"type": "text"}, {"type": "json_object"}),
    ("structured_outputs", None, {"regex": "a"}),
    ("guided_json", None, {}),
    ("guided_regex", None, "a"),
    ("guided_choice", None, ["a"]),
    ("guided_grammar", None, "a"),
    ("logits_processors", [], ["a"]),
    ("allowed_token_ids", None, [1]),
    ("bad_words", [], ["x"]),
    ("use_beam_search", False, True),
    ("length_penalty", 1.0, 0.5),
    ("prompt_embeds", None, "x"),
    ("truncate_prompt_tokens", None, 3),
    ("logprob_token_ids", [], [1]),
    ("spaces_between_special_tokens", True, False),
    ("kv_transfer_params", None, {}),
    ("vllm_xargs", {}, {"a": 1}),
]


def parse(**fields) -> CompletionRequest:
    body = {"model": "m", "prompt": "hi"} | fields
    return parse_body(CompletionRequest, json.dumps(body))


def refusal(**fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields).sampling_params()
    return caught.value


def test_defaults_are_those_of_the_engine():
    assert parse().sampling_params() == SamplingParams()


def test_null_is_the_default():
    nulls = dict.fromkeys(CompletionRequest.model_fields.keys() - {"model", "prompt", "max_tokens"})
    assert parse(**nulls) == parse()
    assert parse(max_tokens=None).sampling_params().max_tokens is None  # to the model's length


def test_every_sampling_field_reaches_the_engine():
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "seed": 7,
        "stop": ("a", "b"),
        "stop_token_ids": (4, 5),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 3,
        "skip_special_tokens": False,
    }
    assert fields.keys() == set(SamplingParams.__dataclass_fields__)
    assert parse(**fields).sampling_params() == SamplingParams(**fields)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], [[]]),
    ],
)
def test_forms_of_the_prompt(prompt, prompts):
    assert parse(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(("asked", "counts"), [(True, 1), (False, None), (2, 2), (None, None)])
def test_logprobs_true_is_one(asked, counts):
    """As vLLM has it."""
    assert parse(logprobs=asked).sampling_params().logprobs == counts


def test_a_seed_of_minus_one_is_none():
    assert parse(seed=-1, n=2).sampling_params().of_choice(1).seed is None


def test_each_choice_has_its_own_seed():
    request = parse(n=3, seed=5)
    assert [request.sampling_params().of_choice(choice).seed for choice in range(3)] == [5, 6, 7]
    assert parse(n=3).sampling_params().of_choice(1).seed is None


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, None),
        ({"logprobs": 2}, 2),
        ({"logprobs": 2, "prompt_logprobs": 5}, 5),
        ({"logprobs": 5, "prompt_logprobs": -1}, -1),
    ],
)
def test_echo_asks_for_logprobs_of_the_prompt(fields, asked):
    assert parse(echo=True, **fields).sampling_params().prompt_logprobs == asked


@pytest.mark.parametrize(("name", "neutral", "other"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, neutral, other):
    assert parse(**{name: neutral}).sampling_params() == SamplingParams()
    error = refusal(**{name: other})
    assert error.param == name
    assert str(error).startswith(f"{name} is not supported: ")


def test_unknown_fields_are_ignored():
    assert parse(user="me", session_id="s", something_new=[1]) == parse()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 16.5}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop"),
    ],
)
def test_errors_name_the_field(fields, param):
    error = refusal(**fields)
    assert error.param == param
    assert param in str(error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b'{"model": "\\ud800", "prompt": ""}']
)
def test_a_body_that_is_no_json_object(body):
    with pytest.raises(RequestError):
        parse_body(CompletionRequest, body)


def test_error_objects():
    bad = ErrorResponse.of(refusal(top_p=2))
    assert json.loads(bad.to_json()) == {
        "error": {
            "message": "top_p must be above 0 and at most 1, got 2.0",
            "type": "BadRequestError",
            "param": "top_p",
            "code": 400,
        }
    }
    unknown = ErrorResponse.of(UnknownModelError("X")).error
    assert unknown.message == "The model `X` does not exist."
    assert (unknown.type, unknown.param, unknown.code) == ("NotFoundError", "model", 404)
