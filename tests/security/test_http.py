# SPDX-License-Identifier: Apache-2.0
"""Attacks on a server's sockets: headers, connections and bodies, over loopback and bounded."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from fastapi import Response

from server.app import make_app
from server.config import ServerConfig
from server.frontend import FrontEnd
from server.http_protocol import BoundedHttp, Connections
from slora_jax.demo import BASE_MODEL
from tests.server.fake_engine import ANSWER, HALF

GET = b"GET /version HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
PROMPT_S = 2.0  # in which what is not an attack is answered meanwhile


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


class Wire:
    """One connection to the server, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The status, and all that follows it until the server closes or falls silent."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-l")), 0
            )
            return int(head.split()[1]), await self.reader.readexactly(length)

    async def is_closed(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while await self.reader.read(65536):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True


class Target:
    """A server that listens, over an engine that only pretends."""

    def __init__(self, front: FrontEnd, port: int) -> None:
        self.front = front
        self.port = port
        self.wires: list[Wire] = []

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        return wire

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        wire = await self.connect()
        await wire.send(data)
        return await wire.answer()

    async def check_alive(self) -> None:
        """Others are served, and in time."""
        began = time.monotonic()
        status, _ = await self.ask(GET + b"Connection: close\r\n\r\n")
        assert status == 200
        assert time.monotonic() - began < PROMPT_S


@asynccontextmanager
async def target(**limits: Any) -> AsyncIterator[Target]:
    config = ServerConfig(model=BASE_MODEL, served_model_names=("base",), **limits)
    front = FrontEnd(config, {"max_num_seqs": 2}, engine_module="tests.server.fake_engine")
    http = partial(BoundedHttp, limits=config, connections=Connections(config.max_connections))
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(front),
            http=http,  # type: ignore[arg-type]
            port=0,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    server.capture_signals = nullcontext  # they stay with pytest
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(20):
        while not server.started or front.client.ready is None:
            await asyncio.sleep(0.01)
    one = Target(front, server.servers[0].sockets[0].getsockname()[1])
    try:
        yield one
    finally:
        for wire in one.wires:
            wire.writer.transport.abort()
        server.should_exit = True
        await serving


def run(story: Callable[[Target], Coroutine[Any, Any, None]], **limits: Any) -> None:
    async def play() -> None:
        async with target(**limits) as one:
            await story(one)

    asyncio.run(play())


def completion(**fields: Any) -> bytes:
    body = json.dumps({"model": "base", "prompt": [ANSWER], "max_tokens": 3, **fields}).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-A: " + b"a" * 2**20 + b"\r\n\r\n",
        GET + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)) + b"\r\n",
        GET + b"".join(b"X-%d: a\r\n" % i for i in range(129)) + b"\r\n",
        b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 2**20,
    ],
    ids=["one", "many", "a few too many", "url", "empty lines"],
)
def test_large_headers(head):
    async def story(one: Target) -> None:
        status, body = await one.ask(head)
        assert status == 431
        assert json.loads(body)["error"]["code"] == 431
        await one.check_alive()

    run(story)


def test_headers_up_to_the_limit():
    async def story(one: Target) -> None:
        headers = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 480) for i in range(127))
        wire = await one.connect()
        for _ in range(2):  # they are counted anew
            await wire.send(GET + headers + b"\r\n")
            assert (await wire.answer())[0] == 200
        body = b" " * 300_000  # in one piece with the headers
        status, _ = await one.ask(POST + b"Content-Length: 300000\r\n\r\n" + body)
        assert status == 400  # it is no JSON, but it was read

    run(story)


def test_who_leaves_in_the_middle_of_a_body_is_no_bug(caplog):
    async def story(one: Target) -> None:
        for route in (b"/v1/completions", b"/tokenize", b"/v1/load_lora_adapter"):
            wire = await one.connect()
            head = POST.replace(b"/v1/completions", route)
            await wire.send(head + b"Content-Length: 100\r\n\r\n{")
            await asyncio.sleep(0.2)
            wire.writer.transport.abort()
        await asyncio.sleep(0.3)
        await one.check_alive()

    run(story)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("step", [10_000, 7, 1])
@pytest.mark.parametrize("ask", [H2C, b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
def test_a_request_for_another_protocol_is_served_in_this_one(ask: bytes, step: int):
    """Its body is read, and what follows it; limits hold."""

    async def story(one: Target) -> None:
        request = completion().replace(b"Host: a\r\n", b"Host: a\r\n" + ask)
        wire = await one.connect()
        sent = request + GET + b"\r\n" + request
        for start in range(0, len(sent), step):
            await wire.send(sent[start : start + step])
        for is_completion in (True, False, True):
            status, body = await wire.answer()
            assert status == 200
            assert ("choices" in json.loads(body)) == is_completion
        many = b"".join(b"X-%d: a\r\n" % i for i in range(130))
        assert (await one.ask(GET + ask + many + b"\r\n"))[0] == 431
        assert (await one.ask(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"))[0] in (400, 404, 405)

    run(story)


@pytest.mark.parametrize("tail", [b"0\r\nX-A: ", b"1;x="], ids=["trailer", "extension"])
def test_endless_framing_of_a_body(tail):
    """What is neither header nor body is quadratic in the parser, too."""

    async def story(one: Target) -> None:
        wire = await one.connect()
        await wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n" + tail)
        try:
            for _ in range(20):
                await wire.send(b"a" * 65536)
        except ConnectionError:
            pass
        assert await wire.is_closed(5)
        await one.check_alive()

    run(story)


def test_silent_and_slow_connections_are_closed():
    async def story(one: Target) -> None:
        silent, slow, after = [await one.connect() for _ in range(3)]
        await after.send(GET + b"\r\n")
        assert (await after.answer())[0] == 200
        await after.send(b"\r\n")  # which stops uvicorn's own clock
        for byte in GET[:8]:
            await slow.send(bytes([byte]))
            await asyncio.sleep(0.05)
        for wire in (silent, slow, after):
            assert (await wire.answer())[0] == 408
            assert await wire.is_closed(5)

    run(story, header_timeout_s=0.3)


def test_a_connection_that_is_silent_after_its_body_is_closed():
    """The answer came before the body."""

    async def story(one: Target) -> None:
        wire = await one.connect()
        await wire.send(b"POST /nothing HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        assert (await wire.answer())[0] == 404
        await wire.send(b"{}\r\n")
        assert (await wire.answer())[0] == 408

    run(story, header_timeout_s=0.3)


def test_who_does_not_read_is_disconnected(monkeypatch):
    size = 20_000_000  # more than the kernel takes

    async def page() -> Response:
        return Response(b"a" * size)

    async def story(one: Target) -> None:
        idle, reads = await one.connect(), await one.connect()
        for wire in (idle, reads):
            await wire.send(b"GET / HTTP/1.1\r\n\r\n")
        assert len((await reads.answer())[1]) == size
        await asyncio.sleep(2)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await idle.answer()
        await reads.send(GET + b"\r\n")
        assert (await reads.answer())[0] == 200

    monkeypatch.setattr("server.app._page", page)
    run(story, send_timeout_s=1)


def test_who_is_refused_and_goes_on_is_disconnected():
    async def story(one: Target) -> None:
        wire = await one.connect()
        await wire.send(b"nonsense\r\n\r\n")
        assert (await wire.answer())[0] == 400
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 10:
                await wire.send(b"a")
                await asyncio.sleep(0.05)
        assert time.monotonic() - began < 8

    run(story)


def test_a_kept_connection_serves_several_requests():
    async def story(one: Target) -> None:
        wire = await one.connect()
        for _ in range(3):
            await wire.send(GET + b"\r\n" + completion())
            assert (await wire.answer())[0] == 200
            assert (await wire.answer())[0] == 200
            await asyncio.sleep(0.1)

    run(story, header_timeout_s=0.3)


def test_connections_that_wait_make_room():
    """Silent connections cannot keep others out, and requests in progress are not closed."""

    async def story(one: Target) -> None:
        streaming = await one.connect()
        await streaming.send(completion(prompt=[HALF], stream=True))
        await streaming.reader.readuntil(b"data: ")
        for _ in range(4):  # kept, and without a request since
            wire = await one.connect()
            await wire.send(GET + b"\r\n")
            assert (await wire.answer())[0] == 200
        silent = [await one.connect() for _ in range(20)]
        await one.check_alive()
        assert await silent[0].is_closed(2)
        assert not await streaming.is_closed(0.1)

    run(story, max_connections=4)


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["first", "pipelined"])
def test_bodies_that_do_not_come_make_room(before):
    async def story(one: Target) -> None:
        for _ in range(6):
            wire = await one.connect()
            await wire.send(before + POST + b"Content-Length: 90\r\n\r\n{")
            if before:
                await wire.answer()
        await asyncio.sleep(0.1)
        await one.check_alive()
        assert await one.wires[0].is_closed(2)

    run(story, max_connections=4)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_behind_pipelined_requests_is_noticed(stream):
    async def story(one: Target) -> None:
        wire = await one.connect()
        await wire.send(completion(prompt=[HALF], stream=stream) + 2 * (GET + b"\r\n"))
        async with asyncio.timeout(10):
            while not one.front.client.num_running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            wire.writer.transport.abort()
            while one.front.client.num_running or one.front.admission._places:
                await asyncio.sleep(0.01)

    run(story)


def test_too_many_busy_connections():
    async def story(one: Target) -> None:
        for _ in range(3):
            wire = await one.connect()
            await wire.send(completion(prompt=[HALF], stream=True))
            await wire.reader.readuntil(b"data: ")
        refused = await one.connect()
        status, body = await refused.answer()
        assert status == 503
        assert await refused.is_closed(2)
        assert b"--max-connections" in body
        one.wires[0].writer.transport.abort()
        async with asyncio.timeout(10):
            while one.front.client.num_running > 2:
                await asyncio.sleep(0.01)
        await one.check_alive()

    run(story, max_connections=3)


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_refused_body_that_goes_on(chunked, close):
    """The client reads why, and the rest is thrown away for a moment only."""

    async def story(one: Target) -> None:
        wire = await one.connect()
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000000"
        await wire.send(POST + close + length + b"\r\n\r\n")
        piece = (b"10000\r\n" if chunked else b"") + b" " * 65536 + (b"\r\n" if chunked else b"")
        for _ in range(40):
            await wire.send(piece)
        assert (await wire.answer())[0] == 413
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 10:
                await wire.send(piece)
                await asyncio.sleep(0.01)
        assert time.monotonic() - began < 8
        await one.check_alive()

    run(story, max_body_mib=1)


def test_many_large_bodies_at_once():
    async def story(one: Target) -> None:
        wires = [await one.connect() for _ in range(6)]
        for wire in wires:
            await wire.send(POST + b"Content-Length: 900000\r\n\r\n" + b" " * 800_000)
        statuses = []
        for wire in wires:
            try:
                async with asyncio.timeout(0.5):
                    statuses.append((await wire.answer())[0])
            except TimeoutError:
                statuses.append(None)  # it is still waited for
        assert sorted(map(str, statuses)) == ["429"] * 4 + ["None"] * 2
        assert (await one.ask(completion()))[0] == 200  # small ones pass
        for wire in wires:
            wire.writer.transport.abort()
        await asyncio.sleep(0.1)
        body = completion(user="x" * 500_000)
        assert (await one.ask(body))[0] == 200

    run(story, max_body_mib=1, max_bodies_mib=2)


def test_one_key_has_half_of_the_room_for_bodies():
    async def story(one: Target) -> None:
        body = b"Content-Length: 900000\r\n\r\n" + b" " * 800_000
        await (await one.connect()).send(POST + b"Authorization: Bearer one\r\n" + body)
        wire = await one.connect()
        await wire.send(POST + b"Authorization: Bearer one\r\n" + body)
        assert (await wire.answer())[0] == 429
        wire = await one.connect()
        await wire.send(POST + b"Authorization: Bearer two\r\n" + body + b" " * 100_000)
        assert (await wire.answer())[0] == 400  # it is no JSON, but it was read

    run(story, max_body_mib=1, max_bodies_mib=2, api_keys=("one", "two"))
