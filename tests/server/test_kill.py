# SPDX-License-Identifier: Apache-2.0
"""What happens to requests, probes and processes when something is killed."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.running import RunningServer, is_alive

MODEL = ["--model", "tests/golden/mha/model", "--served-model-name", "base", "--max-num-seqs", "8"]
MODEL += ["--decode-batch-sizes", "8", "--max-num-batched-tokens", "32"]
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


def under_load(server: RunningServer, threads: ThreadPoolExecutor, count: int, **fields) -> list:
    """Requests that have begun to be served."""
    futures = [threads.submit(ask, server, **fields) for _ in range(count)]
    server.wait_for(lambda: server.status()["running"] > 0)
    return futures


def test_sigterm_drains(start):
    server = start()
    engine = server.engine_pid()
    with ThreadPoolExecutor(40) as threads:
        # As much as takes seconds, half of it as streams.
        whole = under_load(server, threads, 16, n=8)
        streams = [threads.submit(ask, server, stream=True, n=4) for _ in range(16)]
        server.wait_for(lambda: server.status()["waiting"] > 100)
        server.process.send_signal(signal.SIGTERM)
        refused = []
        while server.process.poll() is None and not refused:
            status = server.health()
            refused += [status] if status == 503 else []
        assert server.process.wait(60) == 0
        assert refused, "/health did not say that it is going"
        for future in whole:
            choices = future.result().json()["choices"]
            assert [choice["finish_reason"] for choice in choices] == ["length"] * 8
        for future in streams:
            assert future.result().text.endswith("data: [DONE]\n\n")
            assert '"error"' not in future.result().text
    assert not is_alive(engine)
    assert "Fatal" not in server.log.read_text()


def test_sigterm_cuts_off_what_takes_too_long(start):
    server = start("--shutdown-timeout-s", "0")
    with ThreadPoolExecutor(40) as threads:
        whole = under_load(server, threads, 32, n=8)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        codes = {future.result().status_code for future in whole}
        assert 503 in codes
        assert codes <= {200, 503}


def test_a_second_signal_stops_at_once(start):
    server = start()
    with ThreadPoolExecutor(40) as threads:
        under_load(server, threads, 32, n=8)
        server.process.send_signal(signal.SIGINT)
        server.wait_for(lambda: server.health() == 503)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(15)


def test_the_engine_is_killed(start):
    server = start()
    with ThreadPoolExecutor(40) as threads:
        whole = under_load(server, threads, 32, n=8)
        stream = threads.submit(ask, server, stream=True)
        os.kill(server.engine_pid(), signal.SIGKILL)
        codes = [future.result().status_code for future in whole]
        assert set(codes) <= {200, 503}
        assert 503 in codes
        assert "ServiceUnavailableError" in stream.result().text
    assert server.health() == 503
    assert ask(server).status_code == 503
    assert "exit code -9" in server.status()["failure"]
    assert any(line["message"] == "the engine is dead" for line in server.lines())
    assert server.stop() == 0


def test_a_killed_engine_is_started_again(start):
    server = start("--restart")
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    server.wait_for(lambda: server.health() == 503)
    server.wait_until_ready()
    assert server.engine_pid() != first
    assert ask(server).status_code == 200


@pytest.mark.parametrize("loading", [False, True])
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-model-len", "100000"], "max_position_embeddings"),
        (["--max-num-seqs", "64"], "max_num_batched_tokens"),
        (["--lora-modules", "base=tests/golden/mha/adapters/attention"], "name of the base model"),
        (["--lora-modules", "gone=nowhere"], "nowhere"),
        (["--lora-dir", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_start_says_why(start, options, words):
    server = start(*options, ready=False)
    assert server.process.wait(60) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("slora serve: error: ")
    assert words in last
