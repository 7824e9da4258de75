# SPDX-License-Identifier: Apache-2.0
"""The page pool against a model, and its own check against planted corruption."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.pool.allocator import RESERVED_PAGE, PagePool, PageUse


class PoolMachine(RuleBasedStateMachine):
    """The model: every owner's page list. All else (counts, uses, what is free) follows from it."""

    @initialize(num_pages=st.integers(2, 12))
    def create(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.kv: list[list[int]] = []
        self.adapters: list[list[int]] = []

    @property
    def counts(self) -> Counter[int]:
        return Counter(page for owner in self.kv + self.adapters for page in owner)

    @property
    def free(self) -> list[int]:
        return [page for page in range(1, self.pool.num_pages) if page not in self.counts]

    def snapshot(self) -> tuple:
        owners = [self.pool.owners(page) for page in range(self.pool.num_pages)]
        return owners, self.pool.num_free, [self.pool.num_used(use) for use in PageUse]

    def refused(self, operation, *arguments) -> None:
        """The operation raises and changes nothing."""
        before = self.snapshot()
        with pytest.raises(RuntimeError):
            operation(*arguments)
        assert self.snapshot() == before

    @rule(count=st.integers(0, 6), use=st.sampled_from(PageUse))
    def allocate(self, count: int, use: PageUse) -> None:
        free = self.free
        if count > len(free):
            self.refused(self.pool.allocate, count, use)
            return
        pages = self.pool.allocate(count, use)
        assert len(set(pages)) == count
        assert set(pages) <= set(free), "a page was given out twice, or never existed"
        (self.kv if use is PageUse.KV else self.adapters).append(pages)

    @precondition(lambda self: self.kv)
    @rule(data=st.data())
    def share_a_prefix(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.kv))
        prefix = owner[: data.draw(st.integers(0, len(owner)))]
        self.pool.share(iter(prefix))
        self.kv.append(prefix)

    @precondition(lambda self: self.kv or self.adapters)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owners = data.draw(st.sampled_from([o for o in (self.kv, self.adapters) if o]))
        self.pool.release(owners.pop(data.draw(st.integers(0, len(owners) - 1))))

    @rule(data=st.data())
    def release_a_free_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([RESERVED_PAGE, *self.free]))
        self.refused(self.pool.release, [page])

    @rule(data=st.data())
    def share_a_page_that_is_not_kv(self, data: st.DataObject) -> None:
        wrong = [RESERVED_PAGE, *self.free, *(page for owner in self.adapters for page in owner)]
        kv = [page for owner in self.kv for page in owner]
        self.refused(self.pool.share, [*kv, data.draw(st.sampled_from(wrong))])

    @invariant()
    def books_agree_with_the_model(self) -> None:
        self.pool.check(self.kv, self.adapters)
        counts = self.counts
        for page in range(self.pool.num_pages):
            assert self.pool.owners(page) == counts[page]
        assert self.pool.num_free == len(self.free)
        assert self.pool.capacity == self.pool.num_pages - 1
        for use, owners in ((PageUse.KV, self.kv), (PageUse.ADAPTER, self.adapters)):
            assert self.pool.num_used(use) == len({page for owner in owners for page in owner})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_freed_page_can_be_used_for_anything():
    pool = PagePool(3)
    pages = pool.allocate(2, PageUse.KV)
    pool.release(pages)
    assert sorted(pool.allocate(2, PageUse.ADAPTER)) == sorted(pages)
    assert pool.num_used(PageUse.KV) == 0


def test_a_shared_page_is_free_when_its_last_owner_leaves():
    pool = PagePool(2)
    pages = pool.allocate(1, PageUse.KV)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 1


def test_a_pool_has_a_page_beside_the_reserved_one():
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)


def test_a_refused_release_changes_nothing():
    pool = PagePool(3)
    (page,) = pool.allocate(1, PageUse.KV)
    with pytest.raises(RuntimeError):
        pool.release([page, page])
    assert pool.owners(page) == 1


# What `check` is told of the owners, where the truth is one KV page 1 and one adapter page 2, and
# what it says.
WRONG_LISTS = {
    "a forgotten KV owner": ([], [[2]], "owner counts differ"),
    "a forgotten adapter": ([[1]], [], "owner counts differ"),
    "an owner too many": ([[1], [1]], [[2]], "owner counts differ"),
    "a page of nobody": ([[1, 3]], [[2]], "owner counts differ"),
    "KV that is an adapter's": ([[1, 2]], [], "the use of some page"),
    "both KV and an adapter's": ([[1, 2]], [[2]], "page 2 is both"),
    "two adapters on one page": ([[1]], [[2], [2]], "two adapters own page 2"),
    "the reserved page": ([[1, RESERVED_PAGE]], [[2]], "the reserved page"),
}


def pool_with_both_uses() -> PagePool:
    pool = PagePool(5)
    assert pool.allocate(1, PageUse.KV) == [1]
    assert pool.allocate(1, PageUse.ADAPTER) == [2]
    pool.check([[1]], [[2]])
    return pool


@pytest.mark.parametrize(("kv", "adapters", "message"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_check_sees_owners_that_disagree(kv, adapters, message):
    with pytest.raises(AssertionError, match=message):
        pool_with_both_uses().check(kv, adapters)


CORRUPTIONS = {
    "a page lost": lambda pool: pool._free.pop(),
    "a page free twice": lambda pool: pool._free.append(pool._free[-1]),
    "a page free twice for another": lambda pool: pool._free.__setitem__(0, pool._free[-1]),
    "an owned page on the free list": lambda pool: pool._free.append(1),
    "the reserved page on the free list": lambda pool: pool._free.__setitem__(0, RESERVED_PAGE),
    "a wrong owner count": lambda pool: pool._owners.__setitem__(1, 2),
    "an owned free page": lambda pool: pool._owners.__setitem__(3, 1),
    "a use mixed up": lambda pool: pool._use.__setitem__(1, PageUse.ADAPTER),
    "a use left over": lambda pool: pool._use.__setitem__(3, PageUse.KV),
    "a drifted count of used pages": lambda pool: pool._used.__setitem__(PageUse.KV, 2),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_check_sees_corrupted_books(corrupt):
    pool = pool_with_both_uses()
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check([[1]], [[2]])
