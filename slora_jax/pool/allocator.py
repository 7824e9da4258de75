# SPDX-License-Identifier: Apache-2.0
"""Who owns each page of the pool: one free list for KV cache and adapters, on the host."""

import enum
from collections import Counter
from collections.abc import Iterable

RESERVED_PAGE = 0  # always zero; padded page-table entries point to it


class PageUse(enum.Enum):
    KV = "kv"
    ADAPTER = "adapter"


class PagePool:
    """Pages `1 ... num_pages - 1`, each with a count of owners; a page without owners is free.

    A page is either KV or an adapter's while it is owned, never both. All operations are O(pages
    concerned).
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (page 0 is reserved), got {num_pages}")
        self.num_pages = num_pages
        self._owners = [0] * num_pages
        self._use: list[PageUse | None] = [None] * num_pages
        self._free = list(range(num_pages - 1, RESERVED_PAGE, -1))  # a stack: low ids leave first
        self._used = dict.fromkeys(PageUse, 0)

    @property
    def capacity(self) -> int:
        """Pages that can be owned: all but the reserved one."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_used(self, use: PageUse) -> int:
        """Distinct pages in use for KV or for adapters."""
        return self._used[use]

    def owners(self, page: int) -> int:
        return self._owners[page]

    def allocate(self, count: int, use: PageUse) -> list[int]:
        """Takes `count` free pages; the caller is their one owner and has checked `num_free`."""
        if not 0 <= count <= len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
            self._use[page] = use
        self._used[use] += count
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to KV pages."""
        pages = list(pages)
        for page in pages:
            if self._owners[page] == 0 or self._use[page] is not PageUse.KV:
                raise RuntimeError(f"page {page} is not a KV page in use and can't be shared")
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; those without any left are free."""
        pages = list(pages)
        for page, count in Counter(pages).items():
            if self._owners[page] < count:
                raise RuntimeError(f"page {page} is released more often than it has owners")
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                use = self._use[page]
                assert use is not None
                self._used[use] -= 1
                self._use[page] = None
                self._free.append(page)

    def check(self, kv: Iterable[Iterable[int]], adapters: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless the books agree with all owners' page lists.

        Args:
            kv: the page list of every owner of KV pages.
            adapters: the page list of every resident adapter.
        """
        expected = [0] * self.num_pages
        use: list[PageUse | None] = [None] * self.num_pages
        for kind, lists in ((PageUse.KV, kv), (PageUse.ADAPTER, adapters)):
            for page in (page for pages in lists for page in pages):
                assert page != RESERVED_PAGE, "the reserved page has an owner"
                assert use[page] in (None, kind), f"page {page} is both KV and adapter"
                assert kind is PageUse.KV or expected[page] == 0, f"two adapters own page {page}"
                use[page] = kind
                expected[page] += 1
        assert expected == self._owners, "owner counts differ from the owners' page lists"
        assert use == self._use, "the use of some page differs from its owner's"
        free = {p for p in range(1, self.num_pages) if expected[p] == 0}
        assert len(self._free) == len(free), "a page is free twice, or lost"
        assert set(self._free) == free, "the free list differs from the pages without owners"
        for kind in PageUse:
            assert self._used[kind] == use.count(kind), f"the count of {kind} pages is off"
