# SPDX-License-Identifier: Apache-2.0
"""The bodies of /tokenize and /detokenize."""

import pytest

from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.tokenization import TokenizeRequest

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("body", [{}, {"prompt": "hello", "messages": MESSAGES}])
def test_a_prompt_or_messages(body):
    with pytest.raises(RequestError, match="either prompt or messages"):
        TokenizeRequest.model_validate(body)


def test_null_is_the_default():
    optional = TokenizeRequest.model_fields.keys() - {"prompt"}
    body = {"prompt": "hello", **dict.fromkeys(optional)}
    assert TokenizeRequest.model_validate(body) == TokenizeRequest(prompt="hello")


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{}]), ("documents", [{}]), ("chat_template", "{{ messages }}")],
)
def test_what_would_change_the_prompt_is_refused(name, value):
    """As it is where the tokens are used."""
    with pytest.raises(RequestError, match=f"{name} is not supported") as caught:
        TokenizeRequest.model_validate({"messages": MESSAGES, name: value})
    assert caught.value.param == name
    with pytest.raises(RequestError) as other:
        ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES, name: value})
    assert str(other.value) == str(caught.value)
