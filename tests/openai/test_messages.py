# SPDX-License-Identifier: Apache-2.0
"""Messages reach the chat template as clients send them; what is no message is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.errors import parse_body

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def parse(*messages):
    body = json.dumps({"model": "m", "messages": messages})
    return parse_body(ChatCompletionRequest, body).messages


def template_sees(message):
    [parsed] = parse(message)
    return parsed.for_template()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "hi"},
        {"role": "developer", "content": "hi"},
        {"role": "user", "content": "hi", "name": "Ada"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"x": 1}}]},
        {"role": "user", "content": []},
        {"role": "assistant", "content": "x", "reasoning_content": "because"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "calling", "tool_calls": [CALL, CALL]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        {"role": "function", "name": "f", "content": "42"},
    ],
    ids=str,
)
def test_the_template_sees_what_was_sent(message):
    assert template_sees(message) == message


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
@pytest.mark.parametrize("nothing", [{}, {"tool_calls": None}, {"tool_calls": []}], ids=str)
def test_an_assistant_may_say_nothing(content, nothing):
    assert template_sees({"role": "assistant", **content, **nothing}) == {
        "role": "assistant",
        "content": "",
    }


def test_null_is_absent():
    """As in what OpenAI's client writes of its own answers."""
    nulls = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "name"))
    sent = {"role": "assistant", "content": "x", "annotations": [], **nulls}
    assert template_sees(sent) == {"role": "assistant", "content": "x", "annotations": []}


def test_a_refusal_is_text():
    [parsed] = parse({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})
    assert parsed.for_template()["content"] == [{"type": "text", "text": "no"}]
    assert parsed.text == "no"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content is required of this role"),
        ({"role": "user", "content": None}, "content is required of this role"),
        ({"role": "system", "content": None}, "content is required of this role"),
        ({"role": "tool", "tool_call_id": "c"}, "content is required of this role"),
        ({"content": "x"}, "role is required"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"role": "user", "content": ["a"]}, "content"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": [{"type": "text"}]}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "content"),
        ({"role": "assistant", "content": "x", "tool_calls": "f"}, "tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [5]}, "tool_calls"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "image_url is not supported: messages and answers are text",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "input_audio is not supported"),
        ({"role": "user", "content": [{"type": "input_text", "text": "x"}]}, "input_text is not"),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}, "thinking is"),
    ],
    ids=str,
)
def test_what_openai_forbids_is_refused(message, words):
    with pytest.raises(RequestError, match=words) as error:
        parse(message)
    assert error.value.param == "messages"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "x"])


@given(st.lists(st.dictionaries(FIELDS, JSON | st.sampled_from(["user", "assistant"]))))
def test_anything_is_taken_or_refused(messages):
    try:
        parsed = parse(*messages)
    except RequestError:
        return
    for message, sent in zip(parsed, messages, strict=True):
        shown = message.for_template()
        assert shown["role"] == sent["role"]
        assert shown.keys() - {"content"} <= sent.keys()
        for name in shown.keys() - {"content"}:
            assert shown[name] == sent[name]
