# SPDX-License-Identifier: Apache-2.0
"""JAX's own cluster, which admits whoever reaches its port: it is opened late, and then checked.

Its port is a free one, on the link's interface, which process 0 names when all others have proved
who they are. Then each says over the link how it joined, and a fresh value that process 0 gave out
over the link has to come out of JAX's collectives at the place of each process.
"""

import hmac
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np

from slora_jax.cluster.address import Address, free_port
from slora_jax.cluster.channel import ClusterError
from slora_jax.cluster.peers import Peers, understand

_JOIN_S = 120.0  # all are there already, and import JAX at most
_DEVICES_S = 300.0  # to find them, and to compile the first collective
_POLL_S = 0.5
_CHALLENGE_BYTES = 32
_MOST_INVITATION_BYTES = 1024

logger = logging.getLogger(__name__)


class Invitation(msgspec.Struct, frozen=True):
    """What process 0 tells the others, each over its own channel."""

    port: int  # of JAX's coordinator
    challenge: bytes  # to be answered in JAX's cluster


_decode_invitation = msgspec.msgpack.Decoder(Invitation).decode


def join_jax(peers: Peers, secret: bytes, interface: str | None) -> None:
    """Makes the processes' devices one set.

    JAX can't be interrupted: if another process is gone while this one waits inside JAX, this one
    says so and ends on the spot.

    Args:
        peers: the others.
        secret: the cluster's.
        interface: where JAX's coordinator listens, in process 0; None in others.

    Raises:
        ValueError: another process could not join, or they have different numbers of devices.
        ClusterError: process 0 is gone, or somebody else is in JAX's cluster in a process's place.
    """
    import jax  # which whoever only passes a `Cluster` on does not need

    address, challenge = _invited(peers) if interface is None else _invite(peers, interface)

    def join() -> None:
        jax.distributed.initialize(
            str(address),
            peers.num_processes,
            peers.process_id,
            initialization_timeout=int(2 * _JOIN_S),  # when JAX aborts the process
            coordinator_bind_address=None if interface is None else str(address),
        )

    peers.together(lambda: _watched(peers, _JOIN_S, join), lambda _: {})
    _check_devices(peers)
    _check_members(peers, secret, challenge)


def _invite(peers: Peers, interface: str) -> tuple[Address, bytes]:
    address = free_port(interface)
    invitation = Invitation(address.port, secrets.token_bytes(_CHALLENGE_BYTES))
    for channel in peers.channels.values():
        channel.send(msgspec.msgpack.encode(invitation))
    return address, invitation.challenge


def _invited(peers: Peers) -> tuple[Address, bytes]:
    """Process 0 says it when all have come, which may take as long as it waits for them."""
    channel = peers.channels[0]
    invitation = understand(_decode_invitation, channel.receive(_MOST_INVITATION_BYTES))
    return Address(channel.peer_host, invitation.port), invitation.challenge


def _check_devices(peers: Peers) -> None:
    """Compares what the processes say over the link with what JAX sees."""
    import jax

    own = peers.together(lambda: _watched(peers, _DEVICES_S, jax.local_device_count), lambda _: {})
    said = [int(facts["devices"]) for facts in peers.exchange({"devices": str(own)})]
    if len(set(said)) > 1:
        each = ", ".join(f"process {n} has {devices}" for n, devices in enumerate(said))
        raise ValueError(
            f"the processes have different numbers of devices: {each}. Give all as many, for "
            "instance with CUDA_VISIBLE_DEVICES"
        )
    seen = Counter(device.process_index for device in jax.devices())
    if [seen[n] for n in range(peers.num_processes)] != said or len(seen) != len(said):
        raise ClusterError(
            f"JAX sees devices {dict(seen)} by process, but the processes have {said}: somebody "
            "else is in JAX's cluster"
        )


def _check_members(peers: Peers, secret: bytes, challenge: bytes) -> None:
    """Has each process answer inside JAX's collectives what it was asked over the link."""
    from jax.experimental import multihost_utils

    answers = [
        hmac.digest(secret, b"in JAX's cluster\0" + challenge + n.to_bytes(4), "sha256")
        for n in range(peers.num_processes)
    ]
    own = np.frombuffer(answers[peers.process_id], np.uint8)
    found = _watched(peers, _DEVICES_S, lambda: multihost_utils.process_allgather(own))
    if not hmac.compare_digest(np.asarray(found, np.uint8).tobytes(), b"".join(answers)):
        raise ClusterError("somebody else is in JAX's cluster in the place of a process")


def _watched[T](peers: Peers, timeout_s: float, act: Callable[[], T]) -> T:
    """Does something inside JAX; ends this process if another one is gone, or the time is up."""
    done = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while not done.wait(_POLL_S):
            why = peers.lost()
            if why is None and time.monotonic() > deadline:
                why = f"the processes do not find each other inside JAX in {timeout_s:g} s"
            if why is not None and not done.is_set():
                logger.critical("%s: this process ends", why)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        return act()
    finally:
        done.set()
