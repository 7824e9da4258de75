# SPDX-License-Identifier: Apache-2.0
"""Which adapters are in the pool: slots and pages of the resident ones, least recently used first.

An adapter that nobody uses stays, as cache, until its pages or its slot are wanted.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from slora_jax.core import Install
from slora_jax.pool.allocator import PagePool, PageUse


@dataclass(slots=True)
class Resident:
    """An adapter in the pool. `users` are the requests that hold a slot of the batch."""

    slot: int
    pages: tuple[int, ...]
    users: int = 0


class AdapterCache:
    """The adapters in the pool.

    Args:
        pool: where their pages come from.
        num_slots: lines of the device's adapter tables: the most that can be resident.
        pages_of: pages that an adapter needs, by name.
    """

    def __init__(self, pool: PagePool, num_slots: int, pages_of: Callable[[str], int]):
        self._pool = pool
        self._pages_of = pages_of
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first

    def __contains__(self, name: str) -> bool:
        return name in self._resident

    def get(self, name: str) -> Resident:
        return self._resident[name]

    @property
    def residents(self) -> dict[str, Resident]:
        """The resident adapters, least recently used first."""
        return dict(self._resident)

    @property
    def room(self) -> int:
        """Pages that `make_room` can free, the free ones included."""
        return self._pool.num_free + self._evictable()

    def make_room(self, pages: int) -> bool:
        """Evicts unused adapters, oldest first, until `pages` are free; none if that is in vain."""
        if pages <= self._pool.num_free:
            return True  # nearly always, and asked for every row of every step
        if pages > self._pool.num_free + self._evictable():
            return False
        while self._pool.num_free < pages:
            self._evict_one()
        return True

    def acquire(self, name: str, reserve: int = 0) -> tuple[Resident, Install | None] | None:
        """Adds a user; makes the adapter resident first if it isn't.

        Args:
            name: the adapter.
            reserve: pages that must be free afterwards.

        Returns:
            The adapter and, if it must be written into its pages, the command that does so. None
            if there is not enough room even without the unused adapters; nothing is changed then.
        """
        if name in self._resident:
            resident = self._resident[name]
            resident.users += 1  # first, so that it is not evicted for its own sake
            if not self.make_room(reserve):
                resident.users -= 1
                return None
            return resident, None
        wanted = self._pages_of(name)
        slot_in_sight = self._free_slots or any(r.users == 0 for r in self._resident.values())
        if not slot_in_sight or not self.make_room(wanted + reserve):
            return None
        if not self._free_slots:
            self._evict_one()
        pages = tuple(self._pool.allocate(wanted, PageUse.ADAPTER))
        resident = self._resident[name] = Resident(self._free_slots.pop(), pages, users=1)
        return resident, Install(name, resident.slot, pages)

    def release(self, name: str) -> None:
        """Takes a user away; the adapter stays resident."""
        resident = self._resident[name]
        if resident.users == 0:
            raise RuntimeError(f"adapter {name!r} is released but has no user")
        resident.users -= 1
        self._resident.move_to_end(name)  # it was in use until now

    def evict(self, name: str) -> None:
        """Frees one adapter's pages and slot. It must have no users."""
        resident = self._resident[name]
        if resident.users:
            raise RuntimeError(f"adapter {name!r} can't be evicted: {resident.users} users")
        del self._resident[name]
        self._pool.release(resident.pages)
        self._free_slots.append(resident.slot)

    def _evictable(self) -> int:
        return sum(len(r.pages) for r in self._resident.values() if r.users == 0)

    def _evict_one(self) -> None:
        self.evict(next(name for name, r in self._resident.items() if r.users == 0))

    def check(self, users: dict[str, int], num_slots: int) -> None:
        """Raises AssertionError unless users and slots agree with what the caller knows."""
        assert {n: r.users for n, r in self._resident.items() if r.users} == users
        slots = [r.slot for r in self._resident.values()] + self._free_slots
        assert sorted(slots) == list(range(num_slots)), "an adapter slot is lost or shared"
