# SPDX-License-Identifier: Apache-2.0
"""The bodies of /tokenize and /detokenize."""

import json
from typing import Any

import pytest

from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.errors import parse_body
from slora_jax.openai.tokenization import TokenizeRequest

MESSAGES = [{"role": "user", "content": "hello"}]


def tokenize(body: dict[str, Any]) -> TokenizeRequest:
    return parse_body(TokenizeRequest, json.dumps(body))


@pytest.mark.parametrize("body", [{}, {"prompt": "hello", "messages": MESSAGES}])
def test_a_prompt_or_messages(body):
    with pytest.raises(RequestError, match="either prompt or messages"):
        tokenize(body)


def test_null_is_the_default():
    optional = TokenizeRequest.model_fields.keys() - {"prompt"}
    body = {"prompt": "hello", **dict.fromkeys(optional)}
    assert tokenize(body) == TokenizeRequest(prompt="hello")


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{}]), ("documents", [{}]), ("chat_template", "{{ messages }}")],
)
def test_what_would_change_the_prompt_is_refused(name, value):
    """As it is where the tokens are used."""
    with pytest.raises(RequestError, match=f"{name} is not supported") as caught:
        tokenize({"messages": MESSAGES, name: value})
    assert caught.value.param == name
    body = {"model": "m", "messages": MESSAGES, name: value}
    with pytest.raises(RequestError) as other:
        parse_body(ChatCompletionRequest, json.dumps(body))
    assert str(other.value) == str(caught.value)
