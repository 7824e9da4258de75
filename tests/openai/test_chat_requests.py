# SPDX-License-Identifier: Apache-2.0
"""What a chat request may say, what the engine is asked for, and which error it gets."""

import json

import pytest

from slora_jax.core import RequestError, SamplingParams
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.errors import parse_body

TOOL = {"type": "function", "function": {"name": "f"}}

# Each with its neutral value and one that would change the result.
REFUSED = [
    ("tools", [], [TOOL]),
    ("tool_choice", "none", "auto"),
    ("functions", [], [{"name": "f"}]),
    ("function_call", "none", "auto"),
    ("modalities", ["text"], ["text", "audio"]),
    ("audio", None, {"voice": "v"}),
    ("prediction", None, {"type": "content", "content": "x"}),
    ("web_search_options", None, {}),
    ("reasoning_effort", "none", "low"),
    ("verbosity", "medium", "low"),
    ("documents", [], [{"text": "x"}]),
    ("chat_template", None, "{{ messages }}"),
    ("echo", False, True),
    ("best_of", 1, 2),
    ("logit_bias", {}, {"5": 1}),
    ("response_format", {"type": "text"}, {"type": "json_object"}),
    ("structured_outputs", {}, {"regex": "a"}),
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
DEFAULTS = SamplingParams(max_tokens=None)  # to the model's length


def user(content: object, **fields) -> list[dict]:
    return [{"role": "user", "content": content, **fields}]


def parse(**fields) -> ChatCompletionRequest:
    body = {"model": "m", "messages": user("hi")} | fields
    return parse_body(ChatCompletionRequest, json.dumps(body))


def refusal(**fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields).sampling_params()
    return caught.value


def test_defaults_are_those_of_the_engine():
    assert parse().sampling_params() == DEFAULTS


def test_null_is_the_default():
    optional = ChatCompletionRequest.model_fields.keys() - {"model", "messages"}
    assert parse(**dict.fromkeys(optional)) == parse()


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
        "prompt_logprobs": 3,
        "skip_special_tokens": False,
    }
    assert fields.keys() | {"logprobs"} == set(SamplingParams.__dataclass_fields__)
    assert parse(**fields).sampling_params() == SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_tokens": None, "max_completion_tokens": 6}, 6),
    ],
)
def test_max_completion_tokens_goes_before_max_tokens(fields, most):
    assert parse(**fields).sampling_params().max_tokens == most


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True, "top_logprobs": -1}, -1),
        ({"logprobs": True, "top_logprobs": None}, 0),
    ],
)
def test_logprobs_are_asked_for(fields, asked):
    params = parse(**fields).sampling_params()
    assert (params.logprobs, params.prompt_logprobs) == (asked, None)


def test_each_choice_has_its_own_seed():
    request = parse(n=2, seed=5)
    assert [request.sampling_params().of_choice(choice).seed for choice in range(2)] == [5, 6]


def test_a_final_message_is_continued_instead_of_answered():
    request = parse(continue_final_message=True, add_generation_prompt=False)
    assert request.continue_final_message
    assert not request.add_generation_prompt
    for fields in ({}, {"add_generation_prompt": True}):
        assert refusal(continue_final_message=True, **fields).param == "continue_final_message"


@pytest.mark.parametrize(
    ("options", "usage", "continuous_usage"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),  # as in vLLM
    ],
)
def test_stream_options(options, usage, continuous_usage):
    request = parse(stream=True, stream_options=options)
    assert request.includes_usage == usage
    assert request.includes_continuous_usage == continuous_usage


@pytest.mark.parametrize(("name", "neutral", "other"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, neutral, other):
    assert parse(**{name: neutral}).sampling_params() == DEFAULTS
    assert parse(**{name: None}).sampling_params() == DEFAULTS
    error = refusal(**{name: other})
    assert error.param == name
    assert str(error).startswith(f"{name} is not supported: ")


def test_all_that_is_refused_is_tested():
    assert {name for name, _, _ in REFUSED} == ChatCompletionRequest.refused.keys()


def test_what_is_ignored_and_unknown_fields_change_nothing():
    ignored = dict.fromkeys(ChatCompletionRequest.ignored, "x")
    assert parse(something_new=[1], **ignored) == parse()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": user(None)}, "messages"),
        ({"messages": user(5)}, "messages"),
        ({"messages": user([{"type": "text"}])}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"temperature": "hot"}, "temperature"),
        ({"logprobs": 2}, "logprobs"),  # as in completions
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": -2, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": True, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options"),
        ({"n": 0}, "n"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_errors_name_the_field(fields, param):
    error = refusal(**fields)
    assert error.param == param.partition("[")[0]
    assert param in str(error)
