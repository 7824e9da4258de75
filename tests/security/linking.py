# SPDX-License-Identifier: Apache-2.0
"""Processes of a cluster, as threads of one: connections, channels, a process 0 that waits."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from slora_jax.cluster.address import Address, free_port, listen
from slora_jax.cluster.channel import Channel
from slora_jax.cluster.gathering import gather, reach
from slora_jax.cluster.handshake import admit, enter

SECRET = b"a secret of 32 bytes, more or less"


def soon() -> float:
    return time.monotonic() + 5


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname(), timeout=5)
        other, _ = listening.accept()
    other.settimeout(5)
    with one, other:
        yield one, other


class Background[T]:
    """Something that is done in a thread; `result` waits for what it returns or raises."""

    def __init__(self, act) -> None:
        self._act, self._found, self._error = act, None, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._act()
        except Exception as error:
            self._error = error

    def result(self):
        self._thread.join(20)
        assert not self._thread.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._found


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel, socket.socket, socket.socket]]:
    """Process 0's channel and process 1's, and their sockets, after the handshake."""
    with connected() as (one, zero):
        admitted = Background(lambda: admit(zero, SECRET, soon()))
        ours = enter(one, SECRET, 1, 2, soon())
        yield admitted.result().channel, ours, zero, one


class Meeting:
    """Process 0, which waits for the others; their channels live as long as it does."""

    def __init__(self, listening: socket.socket, processes: int, timeout_s: float) -> None:
        self.here = Address(*listening.getsockname()[:2])
        self._processes = processes
        self._came: list[Channel] = []
        self._gathered = Background(lambda: gather(listening, SECRET, processes, timeout_s))

    def come(
        self, process_id: int, processes: int | None = None, secret: bytes = SECRET
    ) -> Channel:
        """Another process, or one that says so."""
        channel = reach(self.here, secret, process_id, processes or self._processes, timeout_s=10)
        self._came.append(channel)
        return channel

    def gathered(self) -> dict[int, Channel]:
        """Process 0's channels."""
        channels = self._gathered.result()
        self._came += channels.values()
        return channels

    def close(self) -> None:
        for channel in self._came:
            channel.close()


@contextmanager
def meeting(
    processes: int = 2, timeout_s: float = 15, host: str = "127.0.0.1"
) -> Iterator[Meeting]:
    with listen(free_port(host), "here") as listening:
        met = Meeting(listening, processes, timeout_s)
        with closing(met):
            yield met
