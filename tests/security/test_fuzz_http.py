# SPDX-License-Identifier: Apache-2.0
"""Bodies that are nearly right: each is answered, none with a 500, and the server goes on."""

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.app import make_app
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.models import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from slora_jax.openai.tokenization import DetokenizeRequest, TokenizeRequest
from tests.server.test_front_end import World, world

ROUTES = {
    "/v1/completions": (CompletionRequest, {"model": "base", "prompt": [0], "max_tokens": 1}),
    "/v1/chat/completions": (
        ChatCompletionRequest,
        {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    ),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [104]}),
    "/v1/load_lora_adapter": (LoadLoraAdapterRequest, {"lora_name": "a", "lora_path": "a"}),
    "/v1/unload_lora_adapter": (UnloadLoraAdapterRequest, {"lora_name": "a"}),
}
ODD = st.sampled_from(
    [
        *(None, True, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, "", "a", "\x00"),
        *("\ud800", "../..", "base:", "a" * 2000, [], {}, [[]], [[[]]], [None], ["a", 1]),
        *([0] * 80, [-1], [2**62], [1.0], {"a": {"b": []}}, {"type": "text"}, {"role": "user"}),
        *([{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], "none"),
    ]
)
JSON = st.recursive(
    ODD, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one)
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route and a body, most of whose fields are as they should be."""
    route = draw(st.sampled_from([*ROUTES]))
    kind, good = ROUTES[route]
    names = [*kind.model_fields, *getattr(kind, "refused", {}), *getattr(kind, "ignored", {}), "x"]
    body: dict[str, Any] = {**good}
    for name in draw(st.lists(st.sampled_from(names), max_size=4)):
        body[name] = draw(JSON)
    data = json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:  # damaged on its way
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return route, data


def test_every_body_is_answered(tmp_path):
    """Six routes, over one server: what is not served is a client's fault, in OpenAI's shape."""
    statuses = set()

    async def story(one: World) -> None:
        loop = asyncio.get_running_loop()

        async def ask(route: str, data: bytes) -> None:
            headers = {"Content-Type": "application/json"}
            response = await one.client.post(route, content=data, headers=headers)
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 403, 404, 413), (response.text, data)
            if response.status_code != 200:
                assert response.json()["error"]["message"]
                assert len(response.content) < 20_000, "an error repeats what was sent"

        @settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
        @given(requests())
        def fuzz(request: tuple[str, bytes]) -> None:
            asyncio.run_coroutine_threadsafe(ask(*request), loop).result(30)

        await asyncio.to_thread(fuzz)
        assert (await one.ask()).status_code == 200
        assert one.front.client.num_running == 0
        assert not one.front.admission._places

    async def play() -> None:
        config = {"allow_runtime_lora_updating": True, "lora_roots": (tmp_path,)}
        async with world(max_body_mib=1, **config) as one:
            await story(one)

    asyncio.run(play())
    assert {200, 400, 404} <= statuses


def test_all_routes_with_bodies_are_covered():
    from server.config import ServerConfig
    from server.frontend import FrontEnd
    from slora_jax.demo import BASE_MODEL

    front = FrontEnd(ServerConfig(model=BASE_MODEL, served_model_names=("base",)), {})
    paths = make_app(front).openapi()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == {*ROUTES}
