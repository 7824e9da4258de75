# SPDX-License-Identifier: Apache-2.0
"""Keys, limits, time, and an engine that dies: the front end over a process that only pretends."""

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import make_app
from server.catalog import Loaded
from server.config import ServerConfig
from server.engine_client import State
from server.errors import Unavailable
from server.frontend import FrontEnd
from slora_jax.adapters.peft import Signature
from slora_jax.demo import BASE_MODEL
from tests.server.fake_engine import ANSWER, ERROR, EXIT, FAIL, HALF, REJECT, SILENCE

type Ask = Callable[..., Coroutine[Any, Any, httpx.Response]]


class World:
    """A front end, and a client of it."""

    def __init__(self, front: FrontEnd, app: Any, client: httpx.AsyncClient) -> None:
        self.front = front
        self.app = app
        self.client = client

    def ask(self, mode: int = ANSWER, **fields) -> Coroutine[Any, Any, httpx.Response]:
        body = {"model": "base", "prompt": [mode], "max_tokens": 3} | fields
        return self.client.post("/v1/completions", json=body)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def ready(self) -> None:
        await self.until(lambda: self.front.client.state is State.READY)


@asynccontextmanager
async def world(wait: bool = True, options: dict[str, Any] | None = None, **config):
    settings = ServerConfig(model=BASE_MODEL, served_model_names=("base",), **config)
    options = {"max_num_seqs": 2} | (options or {})
    front = FrontEnd(settings, options, engine_module="tests.server.fake_engine")
    app = make_app(front)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client,
    ):
        one = World(front, app, client)
        if wait:
            await one.ready()
        yield one


def run(story: Callable[[World], Coroutine[Any, Any, None]], **config) -> None:
    async def play() -> None:
        async with world(**config) as one:
            await story(one)

    asyncio.run(play())


def error(response: httpx.Response) -> dict[str, Any]:
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["code"] in (response.status_code, "context_length_exceeded")
    return found


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_keys():
    async def story(one: World) -> None:
        assert error(await one.ask())["type"] == "AuthenticationError"
        for path in ("/v1/models", "/status", "/v1/nothing", "/load_lora_adapter"):
            response = await one.client.get(path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        probes = ("/health", "/health/live", "/health/ready", "/ping")
        for path in ("/", *probes, "/metrics", "/version", "/openapi.json"):
            assert (await one.client.get(path)).status_code == 200
        assert (await one.client.get("/static/page.js")).status_code == 200
        for given, status in (
            ("Bearer one", 200),
            ("bearer two", 200),
            ("Bearer three", 401),
            ("Basic one", 401),
            ("one", 401),
            ("Bearer", 401),
        ):
            one.client.headers["Authorization"] = given
            assert (await one.client.get("/v1/models")).status_code == status, given

    run(story, api_keys=("one", "two"))


def test_bodies_have_a_limit():
    async def story(one: World) -> None:
        assert (await one.ask(prompt=[0] * 50)).status_code == 200
        assert error(await one.ask(prompt=[0] * 2000))["type"] == "RequestTooLargeError"

        async def in_pieces():
            for _ in range(100):
                yield b" " * 100

        headers = {"Content-Type": "application/json"}
        response = await one.client.post("/v1/completions", content=in_pieces(), headers=headers)
        assert error(response)["type"] == "RequestTooLargeError"

    run(story, max_body_mib=2048 / 2**20)


def test_bodies_arrive_in_time():
    async def story(one: World) -> None:
        async def in_pieces():
            yield b"{"
            await asyncio.sleep(5)

        headers = {"Content-Type": "application/json"}
        response = await one.client.post("/v1/completions", content=in_pieces(), headers=headers)
        assert error(response)["type"] == "RequestTimeoutError"

    run(story, body_timeout_s=0.1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be a JSON object"),
        (b"{", "the body is no JSON"),
        (b"\xff\xff", "the body is no JSON"),
        (b'{"model": "\\ud800", "prompt": "a"}', ""),
        (b'{"model": "base", "prompt": "a", "stop": "\\ud800"}', ""),
        (b"[]", "must be a JSON object"),
        (b'{"model": "base", "prompt": {}}', "prompt must be a string, a list of token ids"),
        (b'{"model": "base"}', "prompt is required"),
        (b'{"model": "base", "prompt": "a", "n": "1"}', "n: "),
        (b'{"model": "base", "prompt": [0], "seed": 1' + b"0" * 30 + b"}", "seed: "),
        (b'{"model": "base", "prompt": "a", "stream_options": {}}', "stream"),
        (b'{"model": "base", "prompt": "\\ud800"}', "the body is no JSON"),
        (b"[" * 100_000, ""),
    ],
)
def test_bad_bodies(content, words):
    async def story(one: World) -> None:
        headers = {"Content-Type": "application/json"}
        response = await one.client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert words in error(response)["message"]

    run(story)


def test_no_such_route_or_method():
    async def story(one: World) -> None:
        assert error(await one.client.get("/v1/nothing"))["type"] == "NotFoundError"
        response = await one.client.get("/v1/completions")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        error(response)

    run(story)


def test_a_full_queue():
    async def story(one: World) -> None:
        silent = [asyncio.create_task(one.ask(SILENCE)) for _ in range(5)]
        await one.until(lambda: one.front.client.num_running == 5)  # 2 in the batch, 3 waiting
        response = await one.ask()
        assert error(response)["type"] == "RateLimitError"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        too_many = await one.ask(n=6)
        assert error(too_many)["param"] == "n"
        assert too_many.status_code == 400
        silent.pop().cancel()  # a client that leaves makes room
        await one.until(lambda: one.front.client.num_running == 4)
        assert (await one.ask()).status_code == 200
        for task in silent:
            task.cancel()
        await one.until(lambda: one.front.client.num_running == 0)

    run(story, max_queued_requests=3)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_take_their_time(stream):
    async def story(one: World) -> None:
        response = await one.ask(SILENCE, stream=stream)
        assert response.status_code == 503
        assert "--request-timeout-s" in error(response)["message"]
        assert one.front.client.num_running == 0
        if stream:  # one that has begun ends with the error
            first, last = events(await one.ask(HALF, stream=True))
            assert first["choices"][0]["text"] == "x"
            assert "0.2 s" in last["error"]["message"]
        await one.until(lambda: one.front.client.num_running == 0)

    run(story, request_timeout_s=0.2)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_have_no_answer(stream):
    async def story(one: World) -> None:
        assert error(await one.ask(ERROR, stream=stream))["message"] == "it overflows"
        late = await one.ask(REJECT, stream=stream)
        assert (late.status_code, error(late)["message"]) == (503, "too late")
        assert late.headers["retry-after"] == "1"

    run(story)


@pytest.mark.parametrize(("mode", "words"), [(EXIT, "exit code 3"), (FAIL, "a step failed")])
def test_a_dead_engine_is_noticed(mode, words):
    async def story(one: World) -> None:
        waiting = [asyncio.create_task(one.ask(SILENCE)) for _ in range(2)]
        streaming = asyncio.create_task(one.ask(HALF, stream=True))
        await one.until(lambda: one.front.client.num_running == 3)
        await asyncio.sleep(0.1)  # the stream has begun
        dying = await one.ask(mode)
        assert dying.status_code == 503
        for response in await asyncio.gather(*waiting):
            assert error(response)["type"] == "ServiceUnavailableError"
        assert "dead" in events(await streaming)[-1]["error"]["message"]
        assert await probes(one) == {"live": 503, "ready": 503, "": 503}
        assert (await one.ask()).status_code == 503
        status = (await one.client.get("/status")).json()
        assert (status["state"], status["pool"]) == ("dead", None)
        assert words in status["failure"]
        assert "vllm:num_requests_running" in (await one.client.get("/metrics")).text

    run(story)


async def probes(one: World) -> dict[str, int]:
    """The statuses of the probes for liveness and readiness, and of the one that has both names."""
    paths = {"live": "/health/live", "ready": "/health/ready", "": "/health"}
    return {name: (await one.client.get(path)).status_code for name, path in paths.items()}


def test_a_failed_engine_is_dead_before_its_process_is():
    async def story(one: World) -> None:
        assert (await one.ask(FAIL)).status_code == 503
        process = one.front.client._process
        assert process is not None
        assert process.returncode is None
        assert (await one.client.get("/health")).status_code == 503

    run(story)


def test_an_engine_that_dies_while_an_adapter_loads(tmp_path):
    async def story(one: World) -> None:
        body = {"lora_name": "hangs", "lora_path": str(tmp_path / "a")}
        response = await one.client.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 503
        assert (await one.client.get("/v1/models/hangs")).status_code == 404

    (tmp_path / "a").mkdir()
    run(story, allow_runtime_lora_updating=True, lora_roots=(tmp_path,))


def test_a_dead_engine_is_started_again(tmp_path, caplog):
    """With what had been loaded, as far as it is still there."""

    async def story(one: World) -> None:
        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        assert (await one.client.post("/v1/load_lora_adapter", json=body)).status_code == 200
        assert (await one.ask(model="mine")).status_code == 200
        assert (await one.ask(EXIT)).status_code == 503
        assert "is being started again" in error(await one.ask())["message"]
        assert await probes(one) == {"live": 200, "ready": 503, "": 503}
        await one.until(lambda: one.front.client.num_restarts == 1)
        await one.ready()
        assert (await one.ask()).status_code == 200
        assert (await one.client.get("/health")).status_code == 200
        assert (await one.ask(model="mine")).status_code == 404  # the fake one has lost it
        assert "slora:engine_restarts_total" in (await one.client.get("/metrics")).text

    run(story, restart=True, allow_runtime_lora_updating=True, lora_roots=(tmp_path,))
    assert "an adapter is lost" in caplog.text


def test_an_engine_that_cannot_start():
    async def story(one: World) -> None:
        await one.until(lambda: one.front.client.state is State.DEAD)
        assert one.front.client.failure == "this model is not supported"
        assert one.front.client.ready is None

    run(story, wait=False, restart=True, options={"refused": True})


def test_the_end_waits_for_a_process_that_is_being_killed():
    async def story(one: World) -> None:
        while one.front.client.state is not State.DEAD:
            await asyncio.sleep(0)
        process = one.front.client._process
        assert process is not None
        assert process.returncode is None
        killed.append(process)

    killed: list[asyncio.subprocess.Process] = []
    run(story, wait=False, options={"refused": True, "lingers": 60})
    assert [process.returncode for process in killed] == [-signal.SIGKILL]


def test_an_engine_that_loads():
    async def story(one: World) -> None:
        response = await one.ask()
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert await probes(one) == {"live": 200, "ready": 503, "": 503}
        await one.ready()
        assert await probes(one) == {"live": 200, "ready": 200, "": 200}

    run(story, wait=False)


def test_an_engine_that_hangs(monkeypatch):
    async def story(one: World) -> None:
        assert (await one.client.get("/health")).status_code == 200
        monkeypatch.setattr("server.engine_client._SILENCE_S", -1.0)
        response = await one.client.get("/health")
        assert "said nothing" in error(response)["message"]
        assert await probes(one) == {"live": 503, "ready": 503, "": 503}

    run(story)


def test_a_client_that_reads_slowly_gets_all():
    """What comes while a piece is on its way comes with the next one, and so does the end."""

    async def story(one: World) -> None:
        events = await stream(one, pause=0.3, max_tokens=9)
        choices = [event["choices"][0] for event in events if event.get("choices")]
        assert "".join(choice["text"] for choice in choices) == "x" * 9
        assert choices[-1]["finish_reason"] == "length"
        assert events[-1]["usage"]["completion_tokens"] == 9

    run(story)


def test_a_client_that_reads_slowly_gets_all_before_an_error():
    async def story(one: World) -> None:
        reading = asyncio.create_task(stream(one, pause=0.5, max_tokens=10_000))
        await one.until(lambda: one.front.client.num_running == 1)
        [(generation, _)] = one.front.client._running.values()
        await one.until(lambda: len(generation.outputs[0].token_ids) > 5)  # most are not yet read
        one.front.client.fail_all(Unavailable("it ends here"))
        *pieces, last = await reading
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert text == "x" * len(generation.outputs[0].token_ids)
        assert last["error"]["message"] == "it ends here"

    run(story)


def test_a_client_that_does_not_read_has_no_more_time(monkeypatch):
    async def story(one: World) -> None:
        reading = asyncio.create_task(stream(one, pause=1000, max_tokens=1000))
        await one.until(lambda: one.front._open == 1)
        await one.until(lambda: one.front._open == 0)
        await one.until(lambda: one.front.client.num_running == 0)
        await reading

    monkeypatch.setattr("server.answering._LAST_EVENT_S", 0.1)
    run(story, request_timeout_s=0.2)


async def stream(one: World, mode: int = ANSWER, *, pause: float, **fields) -> list[Any]:
    """The events of a stream whose client is away for `pause` seconds after the first one."""
    body = {"model": "base", "prompt": [mode], "stream": True, **fields}
    body["stream_options"] = {"include_usage": True}
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"].decode())
            if len(sent) == 1:
                await asyncio.sleep(pause)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"}}
    await one.app(scope, receive, send)
    parts = "".join(sent).split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part.endswith("}")]


def test_prompts_that_are_too_long_do_not_reach_the_engine():
    async def story(one: World) -> None:
        def nobody(*args: object) -> None:
            raise AssertionError("it was sent")

        one.front.client._send = nobody  # type: ignore[method-assign]
        for prompt in ([0] * 64, [[0], [0] * 100], "x" * 100_000, ["a", "x" * 100]):
            response = await one.ask(prompt=prompt)
            assert response.status_code == 400
            assert "maximum context length, max_model_len 64" in error(response)["message"]
            assert error(response)["code"] == "context_length_exceeded"
        chat = {"model": "base", "messages": [{"role": "user", "content": "x" * 100}]}
        response = await one.client.post("/v1/chat/completions", json=chat)
        assert "maximum context length, max_model_len 64" in error(response)["message"]
        del one.front.client._send

    run(story)


def test_only_those_who_leave_are_counted_as_aborted():
    async def story(one: World) -> None:
        before = await aborts(one)
        assert (await one.ask(prompt=[0] * 100)).status_code == 400
        failing = asyncio.create_task(one.ask(SILENCE))
        await one.until(lambda: one.front.client.num_running == 1)
        one.front.client.fail_all(Unavailable("it ends here"))
        assert (await failing).status_code == 503
        assert await aborts(one) == before
        leaving = asyncio.create_task(one.ask(SILENCE))
        await one.until(lambda: one.front.client.num_running == 1)
        leaving.cancel()
        await one.until(lambda: one.front.client.num_running == 0)
        assert await aborts(one) == before + 1

    run(story)


async def aborts(one: World) -> float:
    lines = (await one.client.get("/metrics")).text.splitlines()
    return sum(
        float(one.split()[-1])
        for one in lines
        if one.startswith("vllm:request_success_total") and 'finished_reason="abort"' in one
    )


def test_series_of_adapters_that_are_gone(tmp_path):
    async def story(one: World) -> None:
        async def named() -> bool:
            return 'adapter_name="mine"' in (await one.client.get("/metrics")).text

        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        await one.client.post("/v1/load_lora_adapter", json=body)
        streaming = asyncio.create_task(one.ask(max_tokens=50, model="mine", stream=True))
        await one.until(lambda: one.front.client.num_running == 1)
        await asyncio.sleep(0.02)
        assert (await one.client.post("/v1/unload_lora_adapter", json=body)).status_code == 200
        events(await streaming)
        async with asyncio.timeout(20):
            while await named():
                await asyncio.sleep(0.01)

    run(story, allow_runtime_lora_updating=True, lora_roots=(tmp_path,))


def test_a_bug_is_answered_and_logged(monkeypatch, caplog):
    async def story(one: World) -> None:
        async def fail(*args: object) -> None:
            raise RuntimeError("a bug of ours")

        monkeypatch.setattr(one.front, "submit", fail)
        response = await one.client.post(
            "/v1/completions",
            json={"model": "base", "prompt": [0]},
            headers={"X-Request-Id": "mine"},
        )
        assert error(response)["type"] == "InternalServerError"
        assert response.headers["x-request-id"] == "mine"

    with caplog.at_level(logging.INFO, "slora_jax.server"):
        run(story)
    [record] = [one for one in caplog.records if one.levelname == "ERROR"]
    assert record.__dict__["request_id"] == "mine"
    assert "a bug of ours" in caplog.text


def test_names_have_a_length():
    async def story(one: World) -> None:
        for param in ("model", "lora_path"):
            response = await one.ask(**{param: "x" * 2000})
            assert error(response)["param"] == param
            assert len(response.text) < 1000

    run(story)


def test_models_are_listed_while_adapters_come_and_go(tmp_path):
    async def story(one: World) -> None:
        catalog = one.front.catalog

        async def more() -> dict[str, Signature]:
            catalog.loaded["new"] = Loaded(Path(), False, 0)
            # Before it could be looked at again; of the base model's name.
            return {"gone": ((1,), (1,)), "base": ((1,), (1,))}

        catalog._directories.signatures = more  # type: ignore[method-assign]
        cards = (await one.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["base", "gone", "new"]
        assert (await one.client.get("/v1/models/gone")).status_code == 404

    run(story, lora_dir=tmp_path)


def test_draining():
    """Those in progress end, no others begin, and whoever takes too long is cut off."""

    async def story(one: World) -> None:
        answered = asyncio.create_task(one.ask(max_tokens=100))
        silent = asyncio.create_task(one.ask(SILENCE))
        streaming = asyncio.create_task(one.ask(HALF, stream=True))
        await one.until(lambda: one.front.client.num_running == 3)
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(one.front.drain())
        await asyncio.sleep(0)
        assert "shutting down" in error(await one.ask())["message"]
        assert await probes(one) == {"live": 200, "ready": 503, "": 503}
        assert (await answered).status_code == 200
        await draining
        assert error(await silent)["code"] == 503
        assert events(await streaming)[-1]["error"]["code"] == 503

    run(story, shutdown_timeout_s=0.7)


def test_logs_hold_no_prompts(caplog):
    async def story(one: World) -> None:
        headers = {"X-Request-Id": "mine-1"}
        body = {"model": "base", "prompt": "secret words", "max_tokens": 3, "stop": "hidden"}
        response = await one.client.post("/v1/completions", json=body, headers=headers)
        assert response.headers["x-request-id"] == "mine-1"
        odd = await one.client.get("/v1/models", headers={"X-Request-Id": "a b\tc"})
        assert len(odd.headers["x-request-id"]) == 32
        bad = {"model": "base", "prompt": "secret words", "top_p": "secret"}
        await one.client.post("/v1/completions", json=bad)

    with caplog.at_level(logging.INFO, "slora_jax.server"):
        run(story)
    records = {r.request_id: r.__dict__ for r in caplog.records if r.message == "request"}
    assert {"model": "base", "status": 200, "completion_tokens": 3}.items() <= records[
        "mine-1"
    ].items()
    assert records["mine-1"]["first_token_s"] > 0
    assert "secret" not in str([record.__dict__ for record in caplog.records])
    assert "hidden" not in str([record.__dict__ for record in caplog.records])


def test_logs_hold_prompts_if_told_so(caplog):
    async def story(one: World) -> None:
        await one.ask(prompt="secret words")

    with caplog.at_level(logging.INFO, "slora_jax.server"):
        run(story, enable_log_requests=True)
    assert "secret words" in str([record.__dict__ for record in caplog.records])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"allow_runtime_lora_updating": True}, "lora_roots"),
        ({"lora_dir": Path("/nowhere")}, "no such directory"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"max_body_mib": 0}, "max_body_mib"),
        ({"request_timeout_s": 0.0}, "request_timeout_s"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_body_mib": 300}, "max_bodies_mib"),
        ({"tenant_tokens_per_minute": 0}, "tenant_tokens_per_minute"),
        ({"max_stop_strings": -1}, "max_stop_strings"),
        ({"admin_api_keys": ("",)}, "admin_api_keys"),
        ({"max_queued_requests": -1}, "max_queued_requests"),
        ({"shutdown_timeout_s": -1.0}, "shutdown_timeout_s"),
        ({"served_model_names": ()}, "served_model_names"),
    ],
)
def test_settings_out_of_range(fields, words):
    good = {"model": BASE_MODEL, "served_model_names": ("base",)}
    with pytest.raises(ValueError, match=words):
        ServerConfig(**good | fields)
