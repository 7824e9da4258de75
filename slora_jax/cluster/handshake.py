# SPDX-License-Identifier: Apache-2.0
"""How two processes prove to each other that they know the secret, before they say anything else.

    process 0 -> i    MAGIC, nonce
    i -> process 0    MAGIC, i, number of processes, nonce, proof
    process 0 -> i    proof

A proof is an HMAC-SHA256 under the secret of who gives it and of all that was said before, with a
fresh nonce of each end: it is worth nothing on another connection, nor sent back to whoever gave
it. Sizes are fixed. The keys of the channel come from the secret and from both nonces.
"""

import hmac
import secrets
import socket
import struct
from typing import NamedTuple

from slora_jax.cluster.channel import Channel, ClusterError, read_exactly

MAGIC = b"slora-jax link 1"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_GREETING_BYTES = len(MAGIC) + _NONCE_BYTES
_PROOF_OF_OTHERS = b"the proof of another process"
_PROOF_OF_ZERO = b"the proof of process 0"
_CLAIM = struct.Struct(f"!{len(MAGIC)}sII{_NONCE_BYTES}s")


class HandshakeError(ClusterError):
    """The other end does not know the secret, or does not speak this protocol."""


class Admitted(NamedTuple):
    """A process that knows the secret."""

    process_id: int
    num_processes: int  # as it was told
    channel: Channel


def admit(connection: socket.socket, secret: bytes, deadline: float) -> Admitted:
    """Process 0's end.

    Args:
        connection: whose other end is unknown.
        secret: the cluster's.
        deadline: of `time.monotonic`, for all of the handshake.

    Raises:
        HandshakeError: the other end does not know the secret.
        OSError: it is gone, or says too little in time.
    """
    greeting = MAGIC + secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(greeting)  # what fits into the kernel's buffer does not wait
    magic = read_exactly(connection, len(MAGIC), deadline)
    if magic != MAGIC:  # said at once: others wait for an answer after so few bytes
        raise HandshakeError("it does not speak this protocol")
    claim = magic + read_exactly(connection, _CLAIM.size - len(MAGIC), deadline)
    proof = read_exactly(connection, _PROOF_BYTES, deadline)
    said = greeting + claim
    if not hmac.compare_digest(proof, _mac(secret, _PROOF_OF_OTHERS, said)):
        raise HandshakeError("it does not know the cluster's secret")
    connection.sendall(_mac(secret, _PROOF_OF_ZERO, said))
    _, process_id, num_processes, _ = _CLAIM.unpack(claim)
    to_others, to_zero = _keys(secret, said)
    peer = f"process {process_id}"
    channel = Channel(connection, peer, send_key=to_others, receive_key=to_zero)
    return Admitted(process_id, num_processes, channel)


def enter(
    connection: socket.socket, secret: bytes, process_id: int, num_processes: int, deadline: float
) -> Channel:
    """The end of another process.

    Args:
        connection: whose other end should be process 0.
        secret: the cluster's.
        process_id: of this process.
        num_processes: of the cluster.
        deadline: of `time.monotonic`, for all of the handshake.

    Raises:
        HandshakeError: the other end does not know the secret, or turns this one away.
        OSError: it is gone, or says too little in time.
    """
    greeting = read_exactly(connection, _GREETING_BYTES, deadline)
    if not greeting.startswith(MAGIC):
        raise HandshakeError("what listens there is not process 0 of a cluster")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    claim = _CLAIM.pack(MAGIC, process_id, num_processes, nonce)
    said = greeting + claim
    connection.sendall(claim + _mac(secret, _PROOF_OF_OTHERS, said))
    try:
        proof = read_exactly(connection, _PROOF_BYTES, deadline)
    except ConnectionError as error:
        raise HandshakeError(
            "process 0 ended the handshake: give all processes the same secret"
        ) from error
    if not hmac.compare_digest(proof, _mac(secret, _PROOF_OF_ZERO, said)):
        raise HandshakeError("what listens there does not know the cluster's secret")
    to_others, to_zero = _keys(secret, said)
    return Channel(connection, "process 0", send_key=to_zero, receive_key=to_others)


def _mac(secret: bytes, label: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, label + b"\0" + said, "sha256")


def _keys(secret: bytes, said: bytes) -> tuple[bytes, bytes]:
    """Keys of frames from process 0, and of frames to it."""
    return _mac(secret, b"frames from process 0", said), _mac(secret, b"frames to process 0", said)
