# SPDX-License-Identifier: Apache-2.0
"""The one queue that all policies look at."""

from collections import deque
from collections.abc import Iterator

from slora_jax.core import Request


class WaitingQueue:
    """Requests without a place in the batch: preempted ones first, then the rest by arrival.

    Adding and removing are O(1), however long the queue.
    """

    def __init__(self) -> None:
        self._preempted: deque[Request] = deque()
        self._arrived: dict[Request, None] = {}  # in order of arrival

    def add(self, request: Request) -> None:
        self._arrived[request] = None

    def put_back(self, request: Request) -> None:
        """Takes a preempted request, before all others: the last in the batch comes here first."""
        self._preempted.appendleft(request)

    def remove(self, request: Request) -> None:
        """Raises ValueError if the request is not here."""
        if request in self._arrived:
            del self._arrived[request]
        else:
            self._preempted.remove(request)

    def __len__(self) -> int:
        return len(self._preempted) + len(self._arrived)

    def __iter__(self) -> Iterator[Request]:
        yield from self._preempted
        yield from self._arrived

    def oldest_first(self) -> tuple[Request, ...]:
        """A copy of the queue, so that requests may be admitted while one looks through it."""
        return (*self._preempted, *self._arrived)

    def newest_first(self) -> tuple[Request, ...]:
        """The same by latest arrival; the preempted still come first: their streams have begun."""
        return (*self._preempted, *reversed(self._arrived))
