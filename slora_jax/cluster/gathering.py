# SPDX-License-Identifier: Apache-2.0
"""All processes come to process 0, which admits each of them once, if it knows the secret.

Anyone may reach process 0's port meanwhile. Each connection has a short time for its handshake, in
a thread of its own, so that a silent one keeps nobody waiting.
"""

import logging
import socket
import threading
import time
from contextlib import suppress

import msgspec

from slora_jax.cluster.address import Address
from slora_jax.cluster.channel import Channel, ClusterError
from slora_jax.cluster.handshake import Admitted, HandshakeError, admit, enter
from slora_jax.cluster.peers import understand

HANDSHAKE_S = 8.0
MOST_STRANGERS = 64  # connections in their handshake at a time; the oldest makes room
_MOST_LOGGED = 20  # refused connections
_MOST_REFUSALS = 3  # of this process, before it gives up
_PAUSE_S = 0.2  # between attempts to reach process 0
_VERDICT_BYTES = 1024

logger = logging.getLogger(__name__)


class Verdict(msgspec.Struct, frozen=True):
    """Process 0's first frame: why it does not take this process; None: it does."""

    refusal: str | None


_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode


def gather(
    listening: socket.socket, secret: bytes, num_processes: int, timeout_s: float
) -> dict[int, Channel]:
    """Waits at process 0 until all others have come; their channels by process id.

    Raises:
        ClusterError: some have not come in time.
    """
    return _Gathering(listening, secret, num_processes).run(time.monotonic() + timeout_s)


class _Gathering:
    def __init__(self, listening: socket.socket, secret: bytes, num_processes: int) -> None:
        self._listening = listening
        self._secret = secret
        self._num_processes = num_processes
        self._lock = threading.Lock()  # of all below
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._channels: dict[int, Channel] = {}
        self._refused = 0
        self._open = True

    def run(self, deadline: float) -> dict[int, Channel]:
        try:
            while missing := self._missing():
                if time.monotonic() > deadline:
                    raise ClusterError(self._nobody_came(missing))
                self._listening.settimeout(_PAUSE_S)  # those in threads may be the last
                with suppress(TimeoutError, ConnectionError):
                    self._meet(self._listening.accept()[0])
        except BaseException:
            self._close()
            for channel in self._channels.values():
                channel.close()
            raise
        self._close()
        return dict(sorted(self._channels.items()))

    def _close(self) -> None:
        """Admits no more."""
        with self._lock:
            self._open = False
            for stranger in self._strangers:
                _hang_up(stranger)

    def _missing(self) -> list[int]:
        with self._lock:
            for process_id, channel in list(self._channels.items()):
                if channel.hung_up():  # another one may come in its place
                    logger.warning("process %d came, and is gone again", process_id)
                    self._channels.pop(process_id).close()
            return [n for n in range(1, self._num_processes) if n not in self._channels]

    def _nobody_came(self, missing: list[int]) -> str:
        names = ", ".join(map(str, missing))
        refused = f"; {self._refused} connections were refused" if self._refused else ""
        return (
            f"of {self._num_processes} processes, these have not come in time: {names}{refused}. "
            "Start them with the same coordinator_address and secret, or give more time with "
            "cluster_timeout_s"
        )

    def _meet(self, stranger: socket.socket) -> None:
        with self._lock:
            if len(self._strangers) == MOST_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                _hang_up(oldest)  # its thread notices
            self._strangers[stranger] = None
        threading.Thread(target=self._admit, args=(stranger,), daemon=True).start()

    def _admit(self, stranger: socket.socket) -> None:
        """Runs the handshake, and says what comes of it."""
        address = "?"
        try:
            address = stranger.getpeername()[0]
            admitted = admit(stranger, self._secret, time.monotonic() + HANDSHAKE_S)
            with self._lock:
                refusal = self._refusal(admitted)
                # Before anything else may be sent.
                admitted.channel.send(msgspec.msgpack.encode(Verdict(refusal)))
                if refusal is None:
                    self._channels[admitted.process_id] = admitted.channel
                    return
            admitted.channel.close()
        except (ClusterError, OSError) as error:
            refusal = str(error)
        finally:
            with self._lock:
                self._strangers.pop(stranger, None)
        stranger.close()
        self._log(address, refusal)

    def _refusal(self, admitted: Admitted) -> str | None:
        """Why a process that knows the secret can't take part."""
        process_id = admitted.process_id
        if not self._open:
            return "the cluster is complete, or was given up"
        if admitted.num_processes != self._num_processes:
            return (
                f"num_processes is {self._num_processes} in process 0 and "
                f"{admitted.num_processes} in process {process_id}: give all the same"
            )
        if not 1 <= process_id < self._num_processes:
            return f"process_id {process_id} is none of 1 to {self._num_processes - 1}"
        if process_id in self._channels:
            return f"there is a process {process_id} already: give each its own process_id"
        return None

    def _log(self, address: str, refusal: str) -> None:
        with self._lock:
            self._refused += 1
            refused = self._refused
        if refused <= _MOST_LOGGED:
            more = "; others are only counted" if refused == _MOST_LOGGED else ""
            logger.warning("a connection from %s is refused: %s%s", address, refusal, more)


def _hang_up(stranger: socket.socket) -> None:
    with suppress(OSError):
        stranger.shutdown(socket.SHUT_RDWR)


def reach(
    address: Address, secret: bytes, process_id: int, num_processes: int, timeout_s: float
) -> Channel:
    """Comes to process 0, and waits for it if it is not there yet.

    Raises:
        ClusterError: it can't be reached in time, does not know the secret, or refuses this one.
    """
    deadline, refusals = time.monotonic() + timeout_s, 0
    while True:
        try:
            return _try_to_reach(address, secret, process_id, num_processes, deadline)
        except HandshakeError as error:
            refusals += 1
            if refusals == _MOST_REFUSALS:
                raise ClusterError(f"can't join process 0 at {address}: {error}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"process 0 can't be reached at {address} in {timeout_s:g} s: {error}. Start "
                    "it with the same coordinator_address, and let the port through"
                ) from error
        time.sleep(_PAUSE_S)


def _try_to_reach(
    address: Address, secret: bytes, process_id: int, num_processes: int, deadline: float
) -> Channel:
    soon = min(deadline, time.monotonic() + HANDSHAKE_S)
    connection = socket.create_connection(address, timeout=HANDSHAKE_S)
    try:
        channel = enter(connection, secret, process_id, num_processes, soon)
    except BaseException:
        connection.close()
        raise
    verdict = understand(_decode_verdict, channel.receive(_VERDICT_BYTES, soon))
    if verdict.refusal is not None:
        channel.close()
        raise ClusterError(f"process 0 at {address} refuses this process: {verdict.refusal}")
    return channel
