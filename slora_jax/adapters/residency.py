# SPDX-License-Identifier: Apache-2.0
"""Which adapters are in the pool, in what slots and pages, and which of them goes next.

An adapter that nobody uses stays, as cache, until its pages or its slot are wanted. Which one then
goes is chosen by GreedyDual-Size (Cao and Irani, 1997): least recently used first, but one that
only the disk has stays longer than one that host memory has.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from slora_jax.core import Install
from slora_jax.pool.allocator import PagePool, PageUse


class Loader(Protocol):
    """Brings adapters near the pool, while steps run."""

    def is_ready(self, adapter_id: str) -> bool:
        """Whether it can be written into its pages without waiting for anything."""
        ...

    def want(self, adapter_ids: Sequence[str]) -> None:
        """Says what is needed soon, the first one first; what else was on its way is dropped."""
        ...

    def take(self, adapter_id: str) -> None:
        """Keeps a ready one until it is installed, wanted or not."""
        ...

    def reload_cost(self, adapter_id: str) -> float:
        """What it takes to bring it back, in any unit."""
        ...


class AtHand:
    """A loader where all adapters are always ready, and cost alike by the page."""

    def __init__(self, pages_of: Callable[[str], int]):
        self._pages_of = pages_of

    def is_ready(self, adapter_id: str) -> bool:
        return True

    def want(self, adapter_ids: Sequence[str]) -> None:
        pass

    def take(self, adapter_id: str) -> None:
        pass

    def reload_cost(self, adapter_id: str) -> float:
        return self._pages_of(adapter_id)


@dataclass(slots=True)
class Resident:
    """An adapter in the pool.

    Attributes:
        slot: its line of the device's adapter tables.
        pages: where it lies.
        users: requests that hold a slot of the batch.
        pinned: it stays even if nobody uses it.
        used_at: GreedyDual's clock when it was last used.
    """

    slot: int
    pages: tuple[int, ...]
    users: int = 0
    pinned: bool = False
    used_at: float = 0.0

    @property
    def evictable(self) -> bool:
        return not self.users and not self.pinned


class AdapterCache:
    """The adapters in the pool, by their ids.

    Args:
        pool: where their pages come from.
        num_slots: lines of the device's adapter tables: the most that can be resident.
        pages_of: pages that an adapter needs.
        loader: None: every adapter can be installed at any time.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        pages_of: Callable[[str], int],
        loader: Loader | None = None,
    ):
        self._pool = pool
        self._pages_of = pages_of
        self._loader = loader or AtHand(pages_of)
        self.num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._resident: dict[str, Resident] = {}  # of equal value, the first one goes first
        self._clock = 0.0
        self._wanted: Collection[str] = ()
        self.num_hits = self.num_misses = self.num_evictions = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._resident

    def get(self, adapter_id: str) -> Resident:
        return self._resident[adapter_id]

    @property
    def residents(self) -> dict[str, Resident]:
        """The resident adapters, least recently used first."""
        return dict(self._resident)

    @property
    def room(self) -> int:
        """Pages that `make_room` can free, the free ones included."""
        return self._pool.num_free + self._evictable()

    def pinned_pages(self, beside: str | None = None) -> int:
        """Pages that nothing but unpinning can free, those of one adapter not counted."""
        return sum(len(r.pages) for n, r in self._resident.items() if r.pinned and n != beside)

    # Prefetch

    def is_available(self, adapter_id: str) -> bool:
        """Whether requests for it can run, given pages and a slot."""
        return adapter_id in self._resident or self._loader.is_ready(adapter_id)

    def prefetch(self, adapter_ids: Sequence[str]) -> None:
        """Has those that are not resident brought near, the first one first.

        Resident ones among them are evicted last: somebody waits for them.
        """
        self._wanted = frozenset(adapter_ids)
        self._loader.want([one for one in adapter_ids if one not in self._resident])

    # Room

    def make_room(self, pages: int) -> bool:
        """Evicts unused adapters until `pages` are free; none if that is in vain."""
        if pages <= self._pool.num_free:
            return True  # nearly always, and asked for every row of every step
        if pages > self._pool.num_free + self._evictable():
            return False
        while self._pool.num_free < pages:
            self._evict_one()
        return True

    def make_adapter_room(self, pages: int, reserve: int) -> bool:
        """The same for an adapter's pages, beside `reserve` for others."""
        return self.make_room(pages + reserve)

    def acquire(self, adapter_id: str, reserve: int = 0) -> tuple[Resident, Install | None] | None:
        """Adds a user; makes the adapter resident first if it isn't.

        Args:
            adapter_id: the adapter; it is available.
            reserve: pages that must be free afterwards.

        Returns:
            The adapter and, if it must be written into its pages, the command that does so. None
            if there is not enough room even without the unused adapters; nothing is changed then.
        """
        if adapter_id in self._resident:
            resident = self._resident[adapter_id]
            resident.users += 1  # first, so that it is not evicted for its own sake
            if not self.make_room(reserve):
                resident.users -= 1
                return None
            self.num_hits += 1
            return resident, None
        wanted = self._pages_of(adapter_id)
        slot_in_sight = self._free_slots or any(r.evictable for r in self._resident.values())
        if not slot_in_sight or not self.make_adapter_room(wanted, reserve):
            return None
        if not self._free_slots:
            self._evict_one()
        pages = tuple(self._pool.allocate(wanted, PageUse.ADAPTER))
        resident = self._resident[adapter_id] = Resident(self._free_slots.pop(), pages, users=1)
        self._loader.take(adapter_id)
        self.num_misses += 1
        return resident, Install(adapter_id, resident.slot, pages)

    def release(self, adapter_id: str) -> None:
        """Takes a user away; the adapter stays resident."""
        resident = self._resident[adapter_id]
        if resident.users == 0:
            raise RuntimeError(f"adapter {adapter_id!r} is released but has no user")
        resident.users -= 1
        resident.used_at = self._clock  # it was in use until now
        self._resident[adapter_id] = self._resident.pop(adapter_id)

    def pin(self, adapter_id: str) -> None:
        """Keeps a resident adapter, used or not. One slot at least must be left for others."""
        self._resident[adapter_id].pinned = True

    def unpin(self, adapter_id: str) -> None:
        self._resident[adapter_id].pinned = False

    @property
    def num_pinned(self) -> int:
        return sum(resident.pinned for resident in self._resident.values())

    def evict(self, adapter_id: str) -> None:
        """Frees one adapter's pages and slot, pinned or not. It must have no users."""
        resident = self._resident[adapter_id]
        if resident.users:
            raise RuntimeError(f"adapter {adapter_id!r} can't be evicted: {resident.users} users")
        del self._resident[adapter_id]
        self._pool.release(resident.pages)
        self._free_slots.append(resident.slot)

    def _evictable(self) -> int:
        return sum(len(r.pages) for r in self._resident.values() if r.evictable)

    def _evict_one(self) -> None:
        """Evicts the one with the least value: what bringing it back would cost, by the page."""

        def value(adapter_id: str) -> tuple[bool, float]:
            resident = self._resident[adapter_id]
            cost = self._loader.reload_cost(adapter_id) / len(resident.pages)
            return adapter_id in self._wanted, resident.used_at + cost

        evictable = (name for name, resident in self._resident.items() if resident.evictable)
        victim = min(evictable, key=value)
        self._clock = max(self._clock, value(victim)[1])
        self.evict(victim)
        self.num_evictions += 1

    def check(self, users: dict[str, int], num_slots: int) -> None:
        """Raises AssertionError unless users and slots agree with what the caller knows."""
        assert {n: r.users for n, r in self._resident.items() if r.users} == users
        slots = [r.slot for r in self._resident.values()] + self._free_slots
        assert sorted(slots) == list(range(num_slots)), "an adapter slot is lost or shared"
