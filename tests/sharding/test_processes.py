# SPDX-License-Identifier: Apache-2.0
"""One model on the devices of two processes."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slora_jax import Engine, Follower
from slora_jax.cli import main
from slora_jax.cluster import ALONE, SECRET_VARIABLE, Cluster
from slora_jax.demo import BASE_MODEL
from tests.sharding.models import GQA, write_adapters, write_model
from tests.sharding.process import options, serve

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    one_layer = replace(GQA, num_hidden_layers=1)  # compiles sooner
    write_model(root / "model", one_layer)
    write_adapters(root / "adapters", one_layer)
    return root


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def run(
    directory: Path, partition: str, then: str = "end", host: str = "127.0.0.1", devices=(2, 2)
) -> list[tuple[int, str]]:
    """Exit codes and what was said, of process 0 and of process 1."""
    address = f"{host}:{free_port()}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        SECRET_VARIABLE: secrets.token_hex(16),
        # What one of these tests has compiled the others need not.
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = []
    for rank in range(2):
        arguments = [str(directory), str(rank), "2", address, partition, then]
        flags = f"--xla_force_host_platform_device_count={devices[rank]}"
        command = [sys.executable, "-m", "tests.sharding.process", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "XLA_FLAGS": flags},
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def said_by(text: str) -> dict:
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def test_same_tokens(directory):
    """With S-LoRA's partition, which has all collectives that there are."""
    (code, leader), (followers_code, follower) = run(directory, "slora")
    assert (code, followers_code) == (0, 0), leader + follower
    found = said_by(leader)
    assert found["tokens"] == serve(Engine(directory / "model", **options()), directory)
    assert found["zero"]
    assert "/nowhere" in found["refusal"]
    assert follower.rstrip().endswith("ended")


def test_unequal_numbers_of_devices_are_said_by_all(directory):
    host = "[::1]" if has_ipv6() else "127.0.0.1"
    for code, text in run(directory, "no-comm", host=host, devices=(2, 1)):
        assert code == 0, text
        assert "process 0 has 2, process 1 has 1. Give all as many" in said_by(text)["error"]


@pytest.mark.parametrize(
    ("mistake", "messages"),
    [
        ("other pages", ["num_pages is 128 in process 0", "num_pages is 100 in process 1"]),
        pytest.param(
            "no pages",
            ["and None in process 1: give all", "and 128 in process 0: give all"],
            marks=pytest.mark.long,
        ),
        ("no model", ["process 1 of the engine refuses: ", "nowhere"]),
    ],
)
def test_what_processes_do_not_share_is_said_by_all(directory, mistake, messages):
    """They would wait for each other for ever."""
    for (code, text), message in zip(run(directory, "no-comm", mistake), messages, strict=True):
        assert code == 0, text
        assert message in said_by(text)["error"]


def test_a_lost_process_is_noticed(directory):
    (_, leader), (code, _) = run(directory, "no-comm", "lose")
    assert code == -9
    assert re.search(r"gone|dead|reset|closed|failed", said_by(leader)["error"])


@pytest.mark.long
def test_a_process_that_fails_says_why_and_ends_all(directory):
    """It would wait for process 0, which waits for it in a step."""
    (_, leader), (code, follower) = run(directory, "no-comm", "fail")
    assert code == 1
    assert "RuntimeError: boom" in follower
    assert re.search(r"has failed: RuntimeError: boom|gone|reset|closed|failed", leader)


@pytest.mark.long
def test_an_adapter_that_another_process_lost_fails_its_requests_only(directory):
    (code, leader), (followers_code, follower) = run(directory, "no-comm", "lose its adapters")
    assert (code, followers_code) == (0, 0), leader + follower
    said = said_by(leader)
    found = said["found"]
    assert found.pop("None")[0] == "length"
    assert found.pop(said["last"])[0] == "length"  # the one that it has kept
    assert len(found) == 6
    for reason, why in found.values():
        assert reason == "rejected"
        assert "another process of the engine cannot copy it: RuntimeError: boom" in why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), r"give process_id \(or JAX_PROCESS_ID\) too"),
        (("host", 2, 0), "give host:port of process 0"),
        (("::1:45", 2, 0), r"write an IPv6 address as \[::1\]:4567"),
        (("host:0", 2, 0), "from 1 to 65535"),
        (("0.0.0.0:45", 2, 0), "every interface: give the address of one"),
        (("[::]:45", 2, 0), "every interface: give the address of one"),
        (("host:1", 0, 0), "num_processes must be at least 1"),
        (("host:1", 2, 2), "process_id must be from 0 to 1"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        Cluster.of(*given)


def test_from_the_environment(monkeypatch):
    assert Cluster.of() is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="process_id"):
        Cluster.of()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match=f"{SECRET_VARIABLE}; make one with: openssl rand"):
        Cluster.of()
    monkeypatch.setenv(SECRET_VARIABLE, "0123456789abcdef\n")
    assert Cluster.of() == Cluster("host:1", 2, 1, b"0123456789abcdef")
    assert "0123456789abcdef" not in repr(Cluster.of())
    assert Cluster.of(process_id=0) == Cluster("host:1", 2, 0, b"0123456789abcdef")
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is 'one', no number"):
        Cluster.of()


def test_process_0_leads():
    with pytest.raises(ValueError, match="process 0 leads"):
        Follower(BASE_MODEL, peers=ALONE)


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_flags(command, capsys):
    extra = [] if command == "serve" else ["--input", "-", "--output", "-", "--model", "x"]
    assert main([command, *extra, "--num-processes", "2"]) == 2
    assert "give coordinator_address" in capsys.readouterr().err


def test_several_processes_are_not_restarted(capsys, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "0123456789abcdef")
    cluster = ["--coordinator-address", "127.0.0.1:1", "--num-processes", "2", "--process-id", "0"]
    assert main(["serve", "--restart", *cluster]) == 2
    assert "--restart can't start the other processes again" in capsys.readouterr().err
