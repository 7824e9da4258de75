# SPDX-License-Identifier: Apache-2.0
"""What happens to requests, probes and processes when something is killed."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.running import RunningServer, is_alive

MODEL = ["--model", "tests/golden/mha/model", "--served-model-name", "base", "--max-num-seqs", "8"]
MODEL += ["--decode-batch-sizes", "8", "--max-num-batched-tokens", "8"]
ON_ITS_WAY_S = 1.0  # most that a request needs to the server, on a machine that has much to do
LONG = {"model": "base", "prompt": [1, 2, 3], "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def start(tmp_path):
    """Starts a server of a small model, and ends it."""
    started: list[RunningServer] = []

    def begin(*options: str, ready: bool = True) -> RunningServer:
        server = RunningServer(tmp_path / "log", *MODEL, *options, quick=False)
        started.append(server)
        return server.wait_until_ready() if ready else server

    yield begin
    for server in started:
        server.__exit__()


def ask(server: RunningServer, **fields) -> httpx.Response:
    return server.post("/v1/completions", LONG | fields)


class Load:
    """Clients that ask again and again, until they are not served any more.

    However fast the machine is, there are requests in progress when something is killed.

    Args:
        server: that is asked.
        clients: at once.
        fields: of their requests.
    """

    def __init__(self, server: RunningServer, clients: int, **fields) -> None:
        self._server = server
        self._fields = fields
        self._threads = ThreadPoolExecutor(clients)
        self._clients = [self._threads.submit(self._keep_asking) for _ in range(clients)]

    def _keep_asking(self) -> list[tuple[float, httpx.Response | None]]:
        """When each was sent, and its response; None: the connection failed."""
        asked: list[tuple[float, httpx.Response | None]] = []
        while True:
            sent = time.monotonic()
            try:
                response = ask(self._server, **self._fields)
            except httpx.TransportError:
                return [*asked, (sent, None)]
            asked.append((sent, response))
            if response.status_code != 200 or '"error"' in response.text:
                return asked

    def responses(self, until: float) -> list[httpx.Response]:
        """All of them; every request that had reached the server by then has one."""
        asked = [one for client in self._clients for one in client.result()]
        self._threads.shutdown()
        reached = [response for sent, response in asked if sent < until - ON_ITS_WAY_S]
        assert None not in reached, "a connection broke off"
        return [response for _, response in asked if response is not None]


def test_sigterm_drains(start):
    server = start()
    engine = server.engine_pid()
    whole, streams = Load(server, 16, n=8), Load(server, 16, n=4, stream=True)
    server.wait_for(lambda: server.status()["waiting"] > 32)
    before = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    refused = []
    while server.process.poll() is None and not refused:
        status = server.health()
        refused += [status] if status == 503 else []
    assert server.process.wait(60) == 0
    assert refused, "/health did not say that it is going"
    # The signal may be faster than those that were sent last.
    assert "requests are cut off" not in server.log.read_text()
    answers, streams = whole.responses(before), streams.responses(before)
    assert {response.status_code for response in answers + streams} <= {200, 503}
    for response in answers:
        if response.status_code == 200:
            choices = response.json()["choices"]
            assert [choice["finish_reason"] for choice in choices] == ["length"] * 8
    for response in streams:
        if response.status_code == 200:
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text
    assert not is_alive(engine)
    assert "Fatal" not in server.log.read_text()


@pytest.mark.long
def test_sigterm_cuts_off_what_takes_too_long(start):
    server = start("--shutdown-timeout-s", "0")
    load = Load(server, 32, n=8)
    server.wait_for(lambda: server.status()["waiting"] > 32)
    before = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    codes = {response.status_code for response in load.responses(before)}
    assert codes == {200, 503} or codes == {503}


@pytest.mark.long
def test_a_second_signal_stops_at_once(start):
    server = start()
    Load(server, 32, n=16)
    server.wait_for(lambda: server.status()["waiting"] > 100)
    server.process.send_signal(signal.SIGINT)
    server.wait_for(lambda: server.health() == 503)
    server.process.send_signal(signal.SIGINT)
    server.process.wait(15)


def test_the_engine_is_killed(start):
    server = start()
    whole, streams = Load(server, 16, n=8), Load(server, 16, n=4, stream=True)
    server.wait_for(lambda: server.status()["waiting"] > 32)
    before = time.monotonic()
    os.kill(server.engine_pid(), signal.SIGKILL)
    codes = {response.status_code for response in whole.responses(before)}
    assert codes == {200, 503} or codes == {503}
    broken = [one.text for one in streams.responses(before) if '"error"' in one.text]
    assert broken
    assert all("ServiceUnavailableError" in text for text in broken)
    assert server.health() == 503
    assert ask(server).status_code == 503
    assert "exit code -9" in server.status()["failure"]
    assert any(line["message"] == "the engine is dead" for line in server.lines())
    assert server.stop() == 0


@pytest.mark.long
def test_a_killed_engine_is_started_again(start):
    """With what had been loaded and pinned, however little room that leaves."""
    roots = ["--allow-runtime-lora-updating", "--lora-roots", "tests/golden/mha/adapters"]
    server = start("--restart", "--num-pages", "40", *roots)
    for name, pinned in (("attention", True), ("rslora", False)):
        body = {"lora_name": name, "lora_path": name, "pinned": pinned}
        server.post("/v1/load_lora_adapter", body).raise_for_status()
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    server.wait_for(lambda: server.health() == 503)
    server.wait_until_ready()
    assert server.engine_pid() != first
    for name in ("base", "attention", "rslora"):
        assert ask(server, model=name, max_tokens=4).status_code == 200
    [pinned] = [one for one in server.status()["residents"] if "attention" in one["names"]]
    assert pinned["pinned"]


@pytest.mark.parametrize("loading", [pytest.param(False, marks=pytest.mark.long), True])
def test_the_front_end_is_killed(start, loading):
    """The engine ends too, even in the middle of loading: the device is free."""
    server = start(ready=not loading)
    if loading:
        server.wait_for(lambda: server.health() == 503)
        time.sleep(0.5)
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait()
    until = time.monotonic() + 5
    while is_alive(engine):
        assert time.monotonic() < until, "an orphan holds the device"
        time.sleep(0.05)


def test_sigterm_while_loading(start):
    server = start(ready=False)
    server.wait_for(lambda: server.health() == 503)
    engine = server.engine_pid()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0
    assert not is_alive(engine)


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start("--port", str(taken.getsockname()[1]), ready=False)
        assert server.process.wait(60) == 2
    text = server.log.read_text()
    assert "can't listen on 127.0.0.1" in text
    assert "compil" not in text, "it had begun to load"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-model-len", "100000"], "max_position_embeddings"),
        (["--max-num-seqs", "64"], "max_num_batched_tokens"),
        (["--lora-modules", "base=tests/golden/mha/adapters/attention"], "name of the base model"),
        pytest.param(["--lora-modules", "gone=nowhere"], "nowhere", marks=pytest.mark.long),
        (["--lora-dir", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_start_says_why(start, options, words):
    server = start(*options, ready=False)
    assert server.process.wait(60) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("slora serve: error: ")
    assert words in last
