# SPDX-License-Identifier: Apache-2.0
"""Schemathesis over the OpenAPI document: no answer that it does not describe."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

ROUTES = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{model_id}",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/health",
    "/health/live",
    "/health/ready",
    "/ping",
    "/metrics",
    "/version",
    "/status",
    "/tokenize",
    "/detokenize",
}


@pytest.fixture(scope="session")
def document(server) -> dict:
    return server.get("/openapi.json").json()


def test_every_route_is_described(document):
    assert document["paths"].keys() == ROUTES
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], f"{method} {path}"
            for status, response in operation["responses"].items():
                assert response["description"], f"{method} {path} {status}"
            if method == "post":
                assert "422" not in operation["responses"]
                reference = operation["requestBody"]["content"]["application/json"]["schema"]
                body = document["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
                assert body["examples"], path
                assert body["description"], path


@pytest.fixture(scope="session")
def schema(server):
    load_all_checks()
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


SLOW = {"/v1/completions", "/v1/chat/completions"}  # the engine works for each answer
WITH_BODY = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
}
CONFORMANCE = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    "path",
    [pytest.param(one, marks=pytest.mark.long if one in SLOW else ()) for one in sorted(ROUTES)],
)
def test_answers_are_as_described(schema, path, mode):
    """Whatever is sent, as the document says or against it."""
    if mode is GenerationMode.NEGATIVE and path not in WITH_BODY:
        pytest.skip("nothing can be wrong with it")
    for operation in schema[path].values():

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        def check(case):
            response = case.call(timeout=60)
            checks = [CHECKS.get_one(name) for name in CONFORMANCE]
            case.validate_response(response, checks=checks)
            assert response.status_code < 500 or response.status_code == 503

        check()
