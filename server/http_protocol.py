# SPDX-License-Identifier: Apache-2.0
"""HTTP connections with limits, before there is a request that a middleware could refuse.

uvicorn's parser keeps whatever a client sends until the headers are complete, and in time quadratic
in a header's length. It has no time-out for headers, and no limit of connections.
"""

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import HeadersTooLarge, HttpError, Invalid, TooSlow, Unavailable
from server.limits import Limits

_LINGER_S = 2.0  # in which a refused client may read why, while what it still sends is discarded


class Connections:
    """The open connections; those without a whole request in the order in which they came to wait.

    Args:
        most: that may be open.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._busy: set[BoundedHttp] = set()
        self._waiting: dict[BoundedHttp, None] = {}

    def enter(self, one: "BoundedHttp") -> bool:
        """Takes a new connection, if need be for one that waits; False if all are busy."""
        if len(self._busy) + len(self._waiting) >= self._most:
            if not self._waiting:
                return False
            longest = next(iter(self._waiting))
            self.leave(longest)
            longest.transport.abort()
        self._waiting[one] = None
        return True

    def wait(self, one: "BoundedHttp") -> None:
        """Notes that a connection has no request in progress any more."""
        if one in self._busy:
            self._busy.discard(one)
            self._waiting[one] = None

    def serve(self, one: "BoundedHttp") -> None:
        """Notes that a connection has a whole request in progress."""
        if one in self._waiting:
            del self._waiting[one]
            self._busy.add(one)

    def leave(self, one: "BoundedHttp") -> None:
        """Notes that a connection is closed."""
        self._busy.discard(one)
        self._waiting.pop(one, None)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with limits of size, number and time.

    Args:
        limits: the server's.
        connections: of the server.
        **uvicorns: what uvicorn gives to its protocols.
    """

    def __init__(self, *, limits: Limits, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._open = connections
        self._idle_bytes = 0  # that have brought neither whole headers nor a piece of a body
        self._got_on = False  # whether the last bytes did
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._num_headers = 0
        self._refused = False
        self._upgrades = False  # the request asks for another protocol, and is read again without
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._open.enter(self):
            self._refused = True
            error = Unavailable("all connections are taken (--max-connections)", retry_after=1)
            transport.write(_response(error))
            transport.close()
            return
        self._begin_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.leave(self)
        for cycle in self._unanswered:  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        for timer in (self._header_timer, self._send_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    # What arrives

    def data_received(self, data: bytes) -> None:
        while data and not self._refused and not self.transport.is_closing():
            room = self._limits.max_header_bytes - self._idle_bytes
            piece, data = data[:room], data[room:]
            self._got_on = False
            self._feed(piece)
            self._idle_bytes = 0 if self._got_on else self._idle_bytes + len(piece)
            if self._idle_bytes >= self._limits.max_header_bytes:
                kib = self._limits.max_header_kib
                self._refuse(HeadersTooLarge(f"headers may have {kib} KiB (--max-header-kib)"))

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrades:
                self._feed_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(Invalid("this is no HTTP request"))

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Reads a request again without its `Upgrade`, which a server may ignore (RFC 9110, 7.8).

        The parser stops at its headers. Java's HttpClient asks for HTTP/2 so, and sends a body.
        """
        self._upgrades = False
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Invalid(msg))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_headers = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers <= self._limits.max_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._got_on = True
        self._end_headers()
        if self._num_headers > self._limits.max_headers:
            most = self._limits.max_headers
            self._refuse(HeadersTooLarge(f"a request may have {most} headers (--max-headers)"))
            return
        # Of CONNECT the parser says so, too: there is nothing to be read again.
        self._upgrades = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._upgrades:
            return
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self.cycle.transport = _Patient(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._got_on = True
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._got_on = True
        if self._refused or self._upgrades:
            return
        super().on_message_complete()
        if not self.cycle.response_complete:
            self._open.serve(self)
        if self._linger_timer is not None:  # what was left of a body has come
            self._linger_timer.cancel()
            self._linger_timer = None
            self._begin_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unanswered.popleft()
        if self._refused or self.transport.is_closing():
            return
        if not self.cycle.response_complete:  # the next request of this connection has begun
            if not self.pipeline and self.cycle.more_body:
                self._open.wait(self)
            return
        self._open.wait(self)
        if self.cycle.more_body:  # it was answered before its body was read
            self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.abort)
        else:
            self._begin_headers()

    # Time for headers

    def _begin_headers(self) -> None:
        if self._header_timer is None:
            limit = self._limits.header_timeout_s
            self._header_timer = self.loop.call_later(limit, self._headers_are_late)

    def _end_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        limit = self._limits.header_timeout_s
        self._refuse(TooSlow(f"the headers took longer than {limit:g} s (--header-timeout-s)"))

    # Refusals

    def hang_up(self) -> None:
        """Closes the connection; the client has a moment to read what was said.

        Closed at once, with bytes unread, it would be reset before the client has read.
        """
        self._refused = True
        self._end_headers()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _refuse(self, error: HttpError) -> None:
        """Answers and hangs up."""
        if self._refused or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._refused = True
            self.transport.abort()  # an answer is being written: another one can't begin
            return
        self.transport.write(_response(error))
        self.hang_up()


class _Patient:
    """The transport as a request sees it: answered before it was read, it is closed gently."""

    def __init__(self, protocol: BoundedHttp) -> None:
        self._protocol = protocol
        self._cycle = protocol.cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        if self._cycle.more_body:
            self._protocol.hang_up()
        else:
            self._protocol.transport.close()


def _response(error: HttpError) -> bytes:
    body = error.body().model_dump_json().encode()
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in error.headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
