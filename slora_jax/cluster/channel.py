# SPDX-License-Identifier: Apache-2.0
"""A connection between two processes that have proved to each other who they are.

A frame is the length of what it carries (4 bytes), that, and an HMAC-SHA256 of the frame's number
and both. Each direction has a key and a count of its own, so a frame that was altered, left out,
said again, put in another place or sent back is noticed before anything in it is looked at. What
frames carry is not encrypted.
"""

import hmac
import select
import socket
import struct
import threading
import time
from contextlib import suppress

MOST_BYTES = 1 << 28  # of a frame: a step's command is far smaller

_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!Q")
_TAG_BYTES = 32
_PIECE_BYTES = 1 << 20  # memory is taken as bytes arrive, not as a length promises
# A host that vanished without a word is noticed within a minute.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class ClusterError(Exception):
    """A process of the cluster is missing or gone, or what came is not what it sent."""


def read_exactly(source: socket.socket, size: int, deadline: float | None) -> bytes:
    """Reads that many bytes.

    Args:
        source: the socket; its time-out is changed.
        size: in bytes.
        deadline: of `time.monotonic`, by which all of them must have come; None: never.

    Raises:
        OSError: the other end is gone, or the time is up.
    """
    pieces, left = [], size
    while left:
        if deadline is not None:
            source.settimeout(max(deadline - time.monotonic(), 1e-3))
        piece = source.recv(min(left, _PIECE_BYTES))
        if not piece:
            raise ConnectionError("the connection was closed")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


class Channel:
    """Frames to and from one process. `send` and `receive` may be called by different threads.

    Args:
        connection: after the handshake; the channel owns it.
        peer: the other process, for errors.
        send_key: of frames from here.
        receive_key: of frames to here.
    """

    def __init__(
        self, connection: socket.socket, peer: str, *, send_key: bytes, receive_key: bytes
    ) -> None:
        self._socket = connection
        self._peer = peer
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self._sending = threading.Lock()
        connection.settimeout(None)
        # At once: no step's command waits for the last one's receipt.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def peer_host(self) -> str:
        """The address at which the other process is reached."""
        return self._socket.getpeername()[0]

    def send(self, data: bytes) -> None:
        """Sends a frame. Any thread may.

        Raises:
            ClusterError: the other process is gone.
            ValueError: it is too long.
        """
        if len(data) > MOST_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; the most is {MOST_BYTES}")
        body = _LENGTH.pack(len(data)) + data
        with self._sending:
            tag = _tag(self._send_key, self._sent, body)
            self._sent += 1
            try:
                self._socket.sendall(body + tag)
            except OSError as error:
                self.close()  # half a frame may be on its way
                raise ClusterError(f"{self._peer} is gone: {error}") from error

    def receive(self, most_bytes: int = MOST_BYTES, deadline: float | None = None) -> bytes:
        """Waits for the next frame.

        Args:
            most_bytes: that it may carry.
            deadline: of `time.monotonic`; None: it waits as long as the other process lives.

        Raises:
            ClusterError: the other process is gone or late, or the frame is not the one that it
                sent next. The channel is closed then.
        """
        try:
            return self._receive(most_bytes, deadline)
        except ClusterError:
            self.close()
            raise
        except TimeoutError as error:
            self.close()
            raise ClusterError(f"{self._peer} has said nothing in time") from error
        except OSError as error:
            self.close()
            raise ClusterError(f"{self._peer} is gone: {error}") from error

    def _receive(self, most_bytes: int, deadline: float | None) -> bytes:
        header = read_exactly(self._socket, _LENGTH.size, deadline)
        (size,) = _LENGTH.unpack(header)
        if size > most_bytes:
            raise ClusterError(f"{self._peer}: a frame of {size} bytes; the most is {most_bytes}")
        data = read_exactly(self._socket, size, deadline)
        tag = read_exactly(self._socket, _TAG_BYTES, deadline)
        if not hmac.compare_digest(tag, _tag(self._receive_key, self._received, header + data)):
            raise ClusterError(f"{self._peer}: a frame was altered, lost or repeated on its way")
        self._received += 1
        if deadline is not None:
            self._socket.settimeout(None)
        return data

    def hung_up(self) -> bool:
        """Whether the other process has closed its end; what it said before may wait to be read."""
        poll = select.poll()
        with suppress(ValueError):  # closed here
            poll.register(self._socket, getattr(select, "POLLRDHUP", 0))
            return bool(poll.poll(0))
        return True

    def close(self) -> None:
        """Ends the connection; whoever waits for a frame hears of it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _tag(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + body, "sha256")
