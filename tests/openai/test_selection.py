# SPDX-License-Identifier: Apache-2.0
"""Which adapter a request asks for, in each of the ways to name one."""

import pytest

from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.errors import ErrorResponse, UnknownModelError
from slora_jax.openai.selection import find_adapter, find_adapters

BASES = ("base", "org/base", "b:1")
ADAPTERS = ("upper", "rot13", "team:sql", "base:upper:v2")


def ask(model: str, prompt=("a", "b"), **fields) -> list[str | None]:
    body = {"model": model, "prompt": list(prompt), **fields}
    return find_adapters(CompletionRequest.model_validate(body), BASES, ADAPTERS)


def test_the_base_is_served_under_its_own_names_only():
    assert find_adapter("base", ["base"], ["upper"]) is None
    assert find_adapter("upper", ["base"], ["upper"]) == "upper"
    with pytest.raises(UnknownModelError):
        find_adapter("", ["base"], ["upper"])


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("base", None),
        ("org/base", None),
        ("b:1", None),  # a base model's name, not the adapter 1 of b
        ("upper", "upper"),
        ("base:upper", "upper"),
        ("org/base:rot13", "rot13"),
        ("team:sql", "team:sql"),
        ("base:team:sql", "team:sql"),
        ("base:upper:v2", "base:upper:v2"),
        ("b:1:rot13", "rot13"),
        ("b:1:team:sql", "team:sql"),
    ],
)
def test_model_names_the_adapter(model, adapter):
    """A name that exists as it stands goes before `base:adapter`."""
    assert find_adapter(model, BASES, ADAPTERS) == adapter


def test_a_base_of_the_adapters_name_is_the_base():
    assert find_adapter("upper", ["upper"], ["upper"]) is None


@pytest.mark.parametrize(
    "model",
    ["", ":", "nobody", "base:", ":upper", "base:nobody", "nobody:upper", "base:base", "BASE"],
)
def test_unknown_models(model):
    with pytest.raises(UnknownModelError) as caught:
        find_adapter(model, BASES, ADAPTERS)
    error = ErrorResponse.of(caught.value).error
    assert (error.type, error.code, error.param) == ("NotFoundError", 404, "model")
    assert error.message == f"The model `{model}` does not exist."


@pytest.mark.parametrize(
    ("model", "lora_path"),
    [("base", "upper"), ("upper", "upper"), ("base:upper", "upper"), ("upper", None)],
)
def test_lora_path_names_the_adapter(model, lora_path):
    assert find_adapter(model, BASES, ADAPTERS, lora_path) == "upper"
    assert ask(model, lora_path=lora_path) == ["upper", "upper"]


@pytest.mark.parametrize("lora_path", ["", "nobody", "base", "base:upper"])
def test_unknown_lora_paths(lora_path):
    """It is an adapter's own name, and never makes the base model answer in its place."""
    for asked in (lora_path, ["upper", lora_path]):
        with pytest.raises(UnknownModelError) as caught:
            ask("base", lora_path=asked)
        error = ErrorResponse.of(caught.value).error
        assert (error.type, error.code, error.param) == ("NotFoundError", 404, "lora_path")


def test_an_unknown_model_is_unknown_whatever_the_lora_path():
    with pytest.raises(UnknownModelError) as caught:
        find_adapter("nobody", BASES, ADAPTERS, "upper")
    assert caught.value.param == "model"


def test_one_lora_path_for_each_prompt():
    assert ask("base", "abc", lora_path=["upper", None, "rot13"]) == ["upper", None, "rot13"]
    assert ask("upper", "ab", lora_path=["upper", None]) == ["upper", "upper"]


@pytest.mark.parametrize("paths", [[], ["upper"], ["upper", None, "rot13"]])
def test_as_many_lora_paths_as_prompts(paths):
    with pytest.raises(RequestError) as caught:
        ask("base", "ab", lora_path=paths)
    assert caught.value.param == "lora_path"
    assert str(caught.value).startswith(f"lora_path names {len(paths)} adapters for 2 prompts")


@pytest.mark.parametrize("lora_path", ["rot13", "nobody", ["upper", "rot13"]])
@pytest.mark.parametrize("model", ["upper", "base:upper"])
def test_two_adapters_for_one_prompt_are_a_conflict(model, lora_path):
    with pytest.raises(RequestError) as caught:
        ask(model, lora_path=lora_path)
    assert not isinstance(caught.value, UnknownModelError)
    assert caught.value.param == "model"
    assert "'upper'" in str(caught.value)


@pytest.mark.parametrize("lora_path", ["upper", ["upper"]])
def test_a_conversation_is_one_prompt(lora_path):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    body = {"model": "base", "messages": messages, "n": 2, "lora_path": lora_path}
    request = ChatCompletionRequest.model_validate(body)
    assert find_adapters(request, BASES, ADAPTERS) == ["upper"]


def test_a_list_of_token_ids_is_one_prompt():
    assert ask("base", [97, 98], lora_path=["upper"]) == ["upper"]
