# SPDX-License-Identifier: Apache-2.0
"""docs/api.md says of every field, route and error what the code does."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from server.errors import HttpError
from server.routes import completions, models, operations
from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest, Message
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.errors import ErrorResponse
from slora_jax.openai.generation import StreamOptions
from slora_jax.openai.models import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from slora_jax.openai.tokenization import DetokenizeRequest, TokenizeRequest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/load_lora_adapter": LoadLoraAdapterRequest,
    "/v1/unload_lora_adapter": UnloadLoraAdapterRequest,
}
NESTED = {"stream_options": StreamOptions, "messages": Message}
ROUTES = [
    route
    for module in (completions, models, operations)
    for route in module.router.routes
    if route.include_in_schema
]


def rows(heading: str) -> list[list[str]]:
    """The cells of the one table under a heading."""
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.M | re.S)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"[|-]+", lines[1])
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    names = [tuple(row[:2]) for row in found]
    assert len(names) == len(set(names)), "a row is there twice"
    return found


def described(path: str, status: str) -> dict[str, list[str]]:
    """The other cells of the fields that are served, refused or ignored."""
    return {row[0].strip("`"): row[2:] for row in rows(f"POST {path}") if row[1] == status}


def defaults(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each field of a model and of those inside it, and its default; empty if it has none."""
    for name, field in kind.model_fields.items():
        yield prefix + name, "" if field.is_required() else f"`{json.dumps(field.default)}`"
        if not prefix and name in NESTED:
            yield from defaults(NESTED[name], f"{name}.")


def test_every_route_with_a_body_is_tested():
    assert {route.path for route in ROUTES if "POST" in route.methods} == BODIES.keys()


@pytest.mark.parametrize(("path", "kind"), BODIES.items())
def test_every_field_is_said_to_be_what_it_is(path, kind):
    assert {row[1] for row in rows(f"POST {path}")} <= {"served", "refused", "ignored"}
    served = described(path, "served")
    assert {name: default for name, (default, _) in served.items()} == dict(defaults(kind))
    for name, (default, words) in served.items():
        assert words.startswith("required; ") == (not default), name
    refused = getattr(kind, "refused", {})
    assert described(path, "refused") == {
        name: [f"`{json.dumps(neutral)}`", remedy] for name, (neutral, remedy) in refused.items()
    }
    ignored = getattr(kind, "ignored", {})
    assert described(path, "ignored") == {name: ["", reason] for name, reason in ignored.items()}


@pytest.mark.parametrize("kind", BODIES.values())
def test_no_field_is_two_things(kind):
    refused, ignored = getattr(kind, "refused", {}), getattr(kind, "ignored", {})
    served = kind.model_fields
    assert not served.keys() & refused.keys()
    assert not (served.keys() | refused.keys()) & ignored.keys()


def test_nested_fields_are_those_of_the_models():
    """So that a model inside a model is not forgotten."""
    for kind in BODIES.values():
        inside = {name for name, field in kind.model_fields.items() if holds_a_model(field)}
        assert inside <= NESTED.keys()


def holds_a_model(field: object) -> bool:
    kinds = [field.annotation]
    for kind in kinds:
        kinds.extend(getattr(kind, "__args__", ()))
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def test_routes():
    written = {
        (method, path.strip("`")): {int(status) for status in statuses.split()}
        for method, path, _, statuses in rows("Routes")
    }
    assert written == {
        (method, route.path.replace(":path}", "}")): {200, *route.responses}
        for route in ROUTES
        for method in route.methods
    }


def test_errors():
    written = {int(status): kind.strip("`") for status, kind, _ in rows("Errors")}
    kinds = [HttpError, *HttpError.__subclasses__()]
    assert written == {kind.status: kind.kind for kind in kinds}
    [example] = re.findall(r"```json\n(.*?)```", DOCUMENT, re.S)
    with pytest.raises(RequestError) as caught:
        CompletionRequest(model="m", prompt="", top_p=2.0).sampling_params()
    assert json.loads(example) == ErrorResponse.of(caught.value).model_dump()
