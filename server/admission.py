# SPDX-License-Identifier: Apache-2.0
"""Who gets a place: one queue, shared fairly between tenants, and each tenant's quotas.

A tenant is an API key or, where no keys are asked for, an adapter. One tenant alone may take the
whole queue. When it is full, a tenant that has less than another one takes that one's latest place:
max-min fairness, as by a switch that drops from its longest queue.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import HttpError, Invalid, TooManyRequests
from server.generation import Generation
from server.limits import Limits

_LONGEST_RETRY_S = 60
_MOST_QUOTAS = 4096  # tenants whose quotas are remembered before full ones are forgotten


class Place:
    """One request's place, from its admission until all its choices have ended.

    Args:
        tenant: whose it is.
        choices: that it asks for.
    """

    def __init__(self, tenant: str, choices: int) -> None:
        self.tenant = tenant
        self._choices = choices
        self._generation: Generation | None = None
        self._turned_away: HttpError | None = None

    @property
    def size(self) -> int:
        """Choices that have not ended."""
        if self._turned_away is not None:
            return 0
        return self._choices if self._generation is None else self._generation.num_unfinished

    @property
    def has_begun(self) -> bool:
        """Whether some of its tokens have come: it keeps its place then."""
        return self._generation is not None and self._generation.has_begun

    def begin(self, generation: Generation) -> None:
        """Takes note of what the engine works on."""
        self._generation = generation

    def check(self) -> None:
        """Raises TooManyRequests if it was turned away while it was not with the engine."""
        if self._turned_away is not None:
            raise self._turned_away

    def turn_away(self, error: HttpError) -> None:
        """Ends the request for the benefit of others."""
        self._turned_away = error
        if self._generation is not None:
            self._generation.fail(error)


class Admission:
    """Decides whether a request may join those in progress.

    Args:
        limits: the server's.
        ends_per_second: gives the rate at which choices ended lately.
    """

    def __init__(self, limits: Limits, ends_per_second: Callable[[], float]) -> None:
        self._limits = limits
        self._ends_per_second = ends_per_second
        self._places: dict[Place, None] = {}  # in order of arrival
        rates = {
            "requests": limits.tenant_requests_per_minute,
            "tokens": limits.tenant_tokens_per_minute,
        }
        self._rates = {what: rate for what, rate in rates.items() if rate is not None}
        self._quotas: dict[str, dict[str, Bucket]] = {}  # of tenants, by what is counted

    @contextmanager
    def place(self, tenant: str, choices: int, batch: int) -> Iterator[Place]:
        """A place for a request while it lasts.

        Args:
            tenant: whose request it is.
            choices: that it asks for.
            batch: choices that the engine can run at once; the queue is beside them.

        Raises:
            Invalid: it could never be admitted.
            TooManyRequests: the queue is full, or the tenant's limit or quota is reached.
        """
        room = batch + self._limits.max_queued_requests
        if choices > room:
            raise Invalid(
                f"the request has {choices} choices, the server takes {room} in all: send fewer "
                "prompts at a time, or lower n",
                "n",
            )
        held = Counter[str]()
        for one in self._places:
            held[one.tenant] += one.size
        self._check_tenant(tenant, held[tenant], choices)
        self._make_room(tenant, choices, room, held)
        place = Place(tenant, choices)
        self._places[place] = None
        try:
            yield place
        finally:
            del self._places[place]

    def charge(self, tenant: str, tokens: int) -> None:
        """Counts tokens against a tenant's quota."""
        if "tokens" in self._rates:
            self._quotas_of(tenant)["tokens"].take(tokens)

    def _check_tenant(self, tenant: str, held: int, choices: int) -> None:
        most = self._limits.max_tenant_requests
        if most is not None and held + choices > most:
            raise TooManyRequests(
                f"{held} choices of this client are in progress, and {most} is the most "
                "(--max-tenant-requests): try again when they have ended",
                retry_after=self._retry_after(held),
            )
        if not self._rates:
            return
        quotas = self._quotas_of(tenant)
        for what, bucket in quotas.items():
            if bucket.wait_s > 0:
                raise TooManyRequests(
                    f"this client's quota of {what} is used up "
                    f"(--tenant-{what}-per-minute): try again later",
                    retry_after=math.ceil(bucket.wait_s),
                )
        if "requests" in quotas:
            quotas["requests"].take(1)

    def _make_room(self, tenant: str, choices: int, room: int, held: Counter[str]) -> None:
        """Turns away the latest requests of tenants that have more, until another one fits."""
        missing = held.total() + choices - room
        for place in self._to_turn_away(tenant, choices, missing, held):
            place.turn_away(
                TooManyRequests(
                    "the queue is full, and other clients have less of it: try again later",
                    retry_after=self._retry_after(room),
                )
            )

    def _to_turn_away(
        self, tenant: str, choices: int, missing: int, held: Counter[str]
    ) -> list[Place]:
        """Places that together free what is missing; raises TooManyRequests if there are none."""
        there = held.total()
        waiting: dict[str, list[Place]] = {}
        if missing > 0:
            for place in self._places:
                if place.tenant != tenant and place.size and not place.has_begun:
                    waiting.setdefault(place.tenant, []).append(place)
        found = []
        while missing > 0:
            richest = max(waiting, key=lambda one: held[one], default=None)
            if richest is None or held[richest] <= held[tenant] + choices:
                raise TooManyRequests(
                    f"{there} choices are in progress or wait, which is the most: try again "
                    "later, or start the server with a larger --max-queued-requests",
                    retry_after=self._retry_after(there),
                )
            place = waiting[richest].pop()
            found.append(place)
            missing -= place.size
            held[richest] -= place.size
            if not waiting[richest]:
                del waiting[richest]
        return found

    def _retry_after(self, waiting: int) -> int:
        """Seconds until half of those that wait will be done, at the rate at which others end."""
        rate = self._ends_per_second()
        seconds = waiting / 2 / rate if rate else 1.0
        return max(1, min(math.ceil(seconds), _LONGEST_RETRY_S))

    def _quotas_of(self, tenant: str) -> "dict[str, Bucket]":
        quotas = self._quotas.get(tenant)
        if quotas is None:
            if len(self._quotas) >= _MOST_QUOTAS:  # a full bucket is as good as a new one
                self._quotas = {
                    name: buckets
                    for name, buckets in self._quotas.items()
                    if not all(bucket.is_full for bucket in buckets.values())
                }
            quotas = {what: Bucket(rate) for what, rate in self._rates.items()}
            self._quotas[tenant] = quotas
        return quotas


class Bucket:
    """A token bucket: fills up by a minute's worth, at a constant rate.

    It may go below zero, as what an answer takes is known at its end; then it has to fill first.

    Args:
        per_minute: the rate.
        clock: gives seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max(per_minute, 1.0)
        self._rate = per_minute / 60
        self._clock = clock
        self._level = self._most
        self._at = clock()

    @property
    def is_full(self) -> bool:
        return self._fill() >= self._most

    @property
    def wait_s(self) -> float:
        """Seconds until it holds one again; 0 if it does."""
        return max(0.0, (1 - self._fill()) / self._rate)

    def take(self, amount: float) -> None:
        """Takes so much out, whether or not it is there."""
        self._level = self._fill() - amount

    def _fill(self) -> float:
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level
