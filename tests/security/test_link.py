# SPDX-License-Identifier: Apache-2.0
"""Strangers on the link between an engine's processes: nobody without the secret gets a word in."""

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from slora_jax.cluster import SECRET_VARIABLE, ClusterError, Peers, gathering, jax_cluster
from slora_jax.cluster.address import free_port
from slora_jax.cluster.channel import MOST_BYTES, Channel
from slora_jax.cluster.gathering import MOST_STRANGERS, reach
from slora_jax.cluster.handshake import MAGIC, HandshakeError, admit, enter
from slora_jax.cluster.peers import Word, understand
from slora_jax.engine.link import Failed, Reply, decode_command, decode_reply, encode
from tests.security.linking import SECRET, Background, channels, connected, meeting, soon

ROOT = Path(__file__).parents[2]
OTHER = b"another secret, just as long as it"
CLAIM_BYTES, PROOF_BYTES = len(MAGIC) + 4 + 4 + 32, 32
GREETING_BYTES = len(MAGIC) + 32


class Executed:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_two_processes_that_know_the_secret_talk():
    with channels() as (zero, one, _, _):
        for n in range(3):
            one.send(b"x" * n)
            zero.send(b"y" * n * 1000)
            assert zero.receive() == b"x" * n
            assert one.receive() == b"y" * n * 1000


# Before the handshake


def test_neither_end_talks_to_one_without_the_secret():
    with connected() as (one, zero):
        admitted = Background(lambda: admit(zero, SECRET, soon()))
        entered = Background(lambda: enter(one, OTHER, 1, 2, soon()))
        with pytest.raises(HandshakeError, match="does not know the cluster's secret"):
            admitted.result()
        zero.close()
        with pytest.raises(HandshakeError, match="same secret"):
            entered.result()


def test_a_false_process_0_is_noticed():
    """It even gives back what it was sent."""
    with connected() as (one, false):
        entered = Background(lambda: enter(one, SECRET, 1, 2, soon()))
        false.sendall(MAGIC + bytes(32))
        claim = false.recv(CLAIM_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        false.sendall(claim[-PROOF_BYTES:])
        with pytest.raises(HandshakeError, match="does not know the cluster's secret"):
            entered.result()


def test_a_challenge_sent_back_proves_nothing():
    with connected() as (rogue, zero):
        admitted = Background(lambda: admit(zero, SECRET, soon()))
        greeting = rogue.recv(GREETING_BYTES, socket.MSG_WAITALL)
        nonce = greeting[len(MAGIC) :]
        rogue.sendall(MAGIC + struct.pack("!II", 1, 2) + nonce + nonce)
        with pytest.raises(HandshakeError, match="does not know"):
            admitted.result()


def test_a_recorded_handshake_opens_nothing():
    recorded = []
    with connected() as (one, zero):
        send = one.sendall

        class Recorder:
            def __getattr__(self, name):
                return getattr(one, name)

            def sendall(self, data: bytes) -> None:
                recorded.append(data)
                send(data)

        admitted = Background(lambda: admit(zero, SECRET, soon()))
        enter(Recorder(), SECRET, 1, 2, soon())  # pyright: ignore[reportArgumentType]
        admitted.result()
    assert len(recorded) == 1
    with connected() as (rogue, zero):
        admitted = Background(lambda: admit(zero, SECRET, soon()))
        rogue.sendall(recorded[0])
        with pytest.raises(HandshakeError, match="does not know"):
            admitted.result()


STRANGERS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # gRPC, as JAX's own processes speak
    pickle.dumps(["#CHALLENGE#"] * 20),
    bytes(4096),
]


@given(st.binary(min_size=CLAIM_BYTES + PROOF_BYTES, max_size=300))
@example(STRANGERS[0] * 9)
@example(MAGIC + bytes(200))
def test_garbage_is_no_handshake(data):
    with connected() as (rogue, zero):
        rogue.sendall(data)
        with pytest.raises(HandshakeError):
            admit(zero, SECRET, soon())


@given(st.binary(min_size=GREETING_BYTES + PROOF_BYTES, max_size=300))
@example(MAGIC + bytes(200))
def test_garbage_is_no_process_0(data):
    with connected() as (one, false):
        false.sendall(data)
        with pytest.raises(HandshakeError):
            enter(one, SECRET, 1, 2, soon())


def test_strangers_keep_nobody_waiting(caplog):
    """More silent ones than may be in their handshake at a time, and some that talk."""
    with meeting() as met, ExitStack() as stack:
        start = time.monotonic()
        for _ in range(2 * MOST_STRANGERS):
            stack.enter_context(socket.create_connection(met.here))
        for data in STRANGERS:
            stack.enter_context(socket.create_connection(met.here)).sendall(data)
        one = met.come(1)
        [zero] = met.gathered().values()
        assert time.monotonic() - start < gathering.HANDSHAKE_S
        zero.send(b"welcome")
        assert one.receive() == b"welcome"
    assert "a connection from 127.0.0.1 is refused" in caplog.text
    assert caplog.text.count("is refused") <= 20


def test_a_handshake_that_trickles_is_ended(monkeypatch):
    """Each byte comes in time, but not all of them."""
    monkeypatch.setattr(gathering, "HANDSHAKE_S", 0.5)
    with meeting() as met, socket.create_connection(met.here, timeout=10) as rogue:
        start = time.monotonic()

        def seconds_open() -> float:
            with suppress(ConnectionError):
                while rogue.recv(1000):
                    pass
            return time.monotonic() - start

        ended = Background(seconds_open)
        with suppress(ConnectionError):
            for byte in MAGIC[:-1]:
                rogue.sendall(bytes([byte]))
                time.sleep(0.2)
        assert ended.result() < 2
        met.come(1)
        met.gathered()


def test_those_who_have_not_come_are_named():
    with meeting(processes=4, timeout_s=1) as met:
        met.come(2)
        with pytest.raises(ClusterError, match=r"these have not come in time: 1, 3\b.*secret"):
            met.gathered()


@pytest.mark.parametrize(
    ("process_id", "processes", "message"),
    [
        (1, 3, "there is a process 1 already"),
        (0, 3, "process_id 0 is none of 1 to 2"),
        (3, 3, "process_id 3 is none of 1 to 2"),
        (2**32 - 1, 3, "is none of 1 to 2"),
        (2, 4, "num_processes is 3 in process 0 and 4 in process 2"),
    ],
)
def test_a_process_that_does_not_fit_is_told_why(process_id, processes, message):
    with meeting(processes=3) as met:
        first = met.come(1)
        with pytest.raises(ClusterError, match=message):
            met.come(process_id, processes)
        second = met.come(2)
        zeros = met.gathered()
        for n, channel in ((1, first), (2, second)):
            zeros[n].send(bytes([n]))
            assert channel.receive() == bytes([n])


def test_one_that_left_again_may_come_back():
    with meeting(processes=3) as met:
        met.come(1).close()
        time.sleep(0.5)
        met.come(1)
        met.come(2)
        assert sorted(met.gathered()) == [1, 2]


def test_process_0_that_never_starts_is_said():
    nobody = free_port("127.0.0.1")
    with pytest.raises(ClusterError, match=r"process 0 can't be reached at 127\.0\.0\.1"):
        reach(nobody, SECRET, 1, 2, timeout_s=0.5)


def test_a_wrong_secret_is_said_at_once(caplog):
    with meeting() as met:
        with pytest.raises(ClusterError, match="give all processes the same secret"):
            met.come(1, secret=OTHER)
        assert "it does not know the cluster's secret" in caplog.text
        met.come(1)
        assert list(met.gathered()) == [1]


# Afterwards


def frames_of(messages: list[bytes]) -> tuple[list[bytes], Channel, socket.socket, ExitStack]:
    """Frames as process 1 sends them, caught on their way, and process 0's end."""
    stack = ExitStack()
    zero, one, _, wire = stack.enter_context(channels())
    relay, caught = stack.enter_context(connected())
    relayed = Channel(relay, "x", send_key=one._send_key, receive_key=b"")
    frames = []
    for message in messages:
        relayed.send(message)
        frames.append(caught.recv(4 + len(message) + 32, socket.MSG_WAITALL))
    return frames, zero, wire, stack


FIRST, SECOND = b"the first message", b"the second one"


@pytest.mark.parametrize(
    ("attack", "heard"),
    [
        (lambda a, b: [a, a], [FIRST]),  # said again
        (lambda a, b: [b], []),  # the first one left out
        (lambda a, b: [b, a], []),  # in another order
        (lambda a, b: [a, b[:-1] + bytes([b[-1] ^ 1])], [FIRST]),
        (lambda a, b: [bytes([*a[:9], a[9] ^ 4, *a[10:]])], []),
        (lambda a, b: [struct.pack("!I", len(FIRST) - 1) + a[4:]], []),
        (lambda a, b: [a[: 4 + len(FIRST)] + bytes(32)], []),  # no tag
        (lambda a, b: [a[:20]], []),  # cut off
        (lambda a, b: [a, b[:-40]], [FIRST]),
    ],
)
def test_frames_that_were_tampered_with_end_the_connection(attack, heard):
    frames, zero, wire, stack = frames_of([FIRST, SECOND])
    with stack:
        wire.sendall(b"".join(attack(*frames)))
        wire.shutdown(socket.SHUT_WR)
        found = []
        receive = iter(zero.receive, None)
        with pytest.raises(ClusterError, match=r"altered|gone"):
            found.extend(receive)
        assert found == heard
        with pytest.raises(ClusterError):
            zero.receive()


def test_a_frame_sent_back_is_noticed():
    with channels() as (zero, _, _, wire):
        zero.send(b"do something")
        frame = wire.recv(4 + len(b"do something") + 32, socket.MSG_WAITALL)
        wire.sendall(frame)
        with pytest.raises(ClusterError, match="altered, lost or repeated"):
            zero.receive()


def test_a_frame_may_not_be_too_long():
    with channels() as (zero, one, _, wire):
        one.send(bytes(10))
        assert len(zero.receive(most_bytes=10)) == 10
        wire.sendall(struct.pack("!I", MOST_BYTES + 1))  # it waits for nothing more
        with pytest.raises(ClusterError, match=f"the most is {MOST_BYTES}"):
            zero.receive(deadline=soon())
        with pytest.raises(ValueError, match=f"the most is {MOST_BYTES}"):
            one.send(bytes(MOST_BYTES + 1))


def test_a_promise_of_many_bytes_takes_no_memory():
    with channels() as (zero, _, _, wire):
        wire.sendall(struct.pack("!I", 200 << 20) + bytes(1000))
        wire.shutdown(socket.SHUT_WR)
        with pytest.raises(ClusterError, match="gone"):
            zero.receive()


def test_a_lost_peer_is_noticed_while_something_else_is_waited_for():
    with channels() as (zero, one, _, _):
        peers = Peers(0, 2, {1: zero})
        assert peers.lost() is None
        one.send(msgspec.msgpack.encode(Word(refusal="process 1 of the engine refuses: x")))
        assert peers.lost() is None
        one.close()
        assert peers.lost() == "process 1 of the engine refuses: x"
    assert (
        peers.lost()
        == "process 1 of the engine is lost: process 1 is gone: the connection was closed"
        or peers.lost()
    )


# What messages hold


@pytest.mark.parametrize("decode", [decode_command, decode_reply])
def test_a_pickle_is_no_message(decode, tmp_path):
    bomb = pickle.dumps(Executed(tmp_path / "executed"))
    with channels() as (zero, one, _, _):
        one.send(bomb)
        with pytest.raises(ClusterError, match="not understood"):
            decode(zero.receive())
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists()


def packed(*values: object) -> bytes:
    return msgspec.msgpack.encode(list(values))


@given(st.binary(max_size=200))
@example(packed("Read", 1, b"x"))
@example(b"\x93\xa4Read\x01\xa1\xff")  # no UTF-8
@example(b"\x92\xa4Drop" + b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff\xa4Drop")  # 2^32 - 1 items
@example(b"\x91\xdb\xff\xff\xff\xffRead")
@example(packed("Drop", [2**70 % 2**64]))
@example(packed("Enter", {"adapter_id": "x", "adapter_slot": 0}, 1))
def test_random_bytes_are_messages_or_refused(data):
    decoders = [decode_command, decode_reply]
    words = msgspec.msgpack.Decoder(list[Word]).decode
    for decode in (*decoders, lambda data: understand(words, data)):
        with suppress(ClusterError):
            decode(data)


@pytest.mark.parametrize("message", [Reply(3, "id", None), Failed("x" * 99)])
def test_replies_come_back(message):
    assert decode_reply(encode(message)) == message


# JAX's own cluster


def test_somebody_else_in_jax_s_cluster_is_noticed(monkeypatch):
    """Who does not know the secret can't answer the challenge, even if it overheard it."""
    answers: list[np.ndarray] = []

    def answer(own: np.ndarray) -> np.ndarray:
        answers.append(own)
        return np.zeros((2, 32), np.uint8)

    monkeypatch.setattr(multihost_utils, "process_allgather", answer)
    for n in range(2):
        with pytest.raises(ClusterError):
            jax_cluster._check_members(Peers(n, 2, {}), SECRET, bytes(32))
    gathered = np.stack(answers)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: gathered)
    jax_cluster._check_members(Peers(0, 2, {}), SECRET, bytes(32))
    for wrong in (gathered[::-1], gathered[[0, 0]], np.zeros_like(gathered), gathered[:1]):
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda own, x=wrong: x)
        with pytest.raises(ClusterError, match="somebody else is in JAX's cluster"):
            jax_cluster._check_members(Peers(0, 2, {}), SECRET, bytes(32))


def test_waiting_inside_jax_ends_when_another_process_does(monkeypatch, caplog):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with channels() as (zero, one, _, _):
        one.close()
        jax_cluster._watched(Peers(0, 2, {1: zero}), 60, lambda: ended.wait(10))
    assert ended.is_set()
    assert "process 1 of the engine is lost" in caplog.text


# All of it

ROGUE = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, 1, initialization_timeout=4)
print("joined")
"""


def test_a_rogue_does_not_join_and_the_real_process_does(tmp_path):
    """The port that is known is the link's: JAX's own opens when all have proved who they are."""
    address = str(free_port("127.0.0.1"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", SECRET_VARIABLE: SECRET.decode()}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    start = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def process(rank: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path), str(rank), "2", address, "no-comm", "no model"]
        command = [sys.executable, "-m", "tests.sharding.process", *arguments]
        return subprocess.Popen(command, env=environment, **start)

    processes = [process(0)]
    try:
        stranger = {k: v for k, v in environment.items() if k != SECRET_VARIABLE}
        command = [sys.executable, "-c", ROGUE, address]
        rogue = subprocess.run(command, env=stranger, timeout=60, check=False, **start)
        assert rogue.returncode != 0
        assert "joined" not in rogue.stdout
        assert processes[0].poll() is None, "process 0 does not go on"
        processes.append(process(1))
        said = [one.communicate(timeout=100)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()
    assert "is refused: it does not speak this protocol" in said[0]
    for text in said:  # they have met: there is no model
        assert "config.json" in json.loads(text.splitlines()[-1])["error"], text
