# SPDX-License-Identifier: Apache-2.0
"""A server in processes of its own, as a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
# Few programs to compile, and small ones: on a CPU each token pays for every request's adapter.
QUICK = ["--max-num-seqs", "16", "--decode-batch-sizes", "16", "--max-num-batched-tokens", "16"]
_START_S = 180.0


class RunningServer:
    """`slora serve` with some options.

    Args:
        log: a file for what it logs.
        options: of the command line.
        quick: compile few programs.
        environment: beside this process's.
    """

    def __init__(
        self, log: Path, *options: str, quick: bool = True, environment: Any = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "slora_jax.cli", "serve", "--port", str(port), *options]
        command += QUICK if quick else []
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stderr=sink,
                stdout=sink,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def wait_until_ready(self) -> "RunningServer":
        self.wait_for(lambda: self.health() == 200, _START_S)
        return self

    def wait_for(self, condition, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it has ended:\n{self.log.read_text()}"
            assert time.monotonic() < until, f"in vain:\n{self.log.read_text()[-5000:]}"
            time.sleep(0.05)

    def health(self) -> int | None:
        """The status of /health; None: nobody listens."""
        try:
            return httpx.get(f"{self.url}/health").status_code
        except httpx.TransportError:
            return None

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, verify=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, verify=False, **options)

    def status(self) -> dict[str, Any]:
        return self.get("/status").raise_for_status().json()

    def lines(self) -> list[dict[str, Any]]:
        """What the front end has logged."""
        found = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [json.loads(line) for line in found]

    def engine_pid(self) -> int:
        """The process that owns the device."""
        [pid] = children_of(self.process.pid, "server.engine_process")
        return pid

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def children_of(parent: int, command: str) -> list[int]:
    """Processes that a process has started, by what their command line holds."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and command in line:
            found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def answers(server: RunningServer, requests: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of completions, one after the other."""
    texts = []
    for request in requests:
        response = server.post("/v1/completions", request).raise_for_status()
        texts.append(response.json()["choices"][0]["text"])
    return texts
