# SPDX-License-Identifier: Apache-2.0
"""What unified paging is compared with: a pool of which adapters may have a fixed share only."""

from collections.abc import Callable

from pallas_kernels.layout import ceil_div
from slora_jax import Engine
from slora_jax.adapters.residency import AdapterCache, Loader
from slora_jax.pool.allocator import PagePool, PageUse


class FixedSplit(AdapterCache):
    """Adapters that never give room to KV cache, nor take any from it.

    Args:
        pool: the pages.
        num_slots, pages_of, loader: as of `AdapterCache`.
        adapter_pages: of the pool's pages; the others are KV cache's.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        pages_of: Callable[[str], int],
        loader: Loader | None = None,
        *,
        adapter_pages: int,
    ):
        super().__init__(pool, num_slots, pages_of, loader)
        self._adapter_pages = adapter_pages

    @property
    def room(self) -> int:
        kv_pages = self._pool.capacity - self._adapter_pages
        return kv_pages - self._pool.num_used(PageUse.KV)

    def make_room(self, pages: int) -> bool:
        return pages <= self.room

    def make_adapter_room(self, pages: int, reserve: int) -> bool:
        used = self._pool.num_used(PageUse.ADAPTER)
        if reserve > self.room or used - self._evictable() + pages > self._adapter_pages:
            return False
        while self._pool.num_used(PageUse.ADAPTER) + pages > self._adapter_pages:
            self._evict_one()
        return True


def split(engine: Engine, share: float | None) -> None:
    """Gives adapters a fixed share of an idle engine's pool; None: unified paging again.

    Raises:
        ValueError: the longest request or the largest adapter would not fit its part.
    """
    assert not engine.has_unfinished, "requests are in progress"
    manager, pool = engine.adapters, engine.pool
    for adapter_id in manager.cache.residents:
        manager.cache.evict(adapter_id)
    slots = manager.cache.num_slots
    if share is None:
        cache = AdapterCache(pool, slots, manager.pages_of, manager.loader)
    else:
        of_adapters = round(share * pool.capacity)
        largest = max(manager.store[name].version.num_pages for name in manager.store)
        assert engine.options.max_model_len is not None
        longest = ceil_div(engine.options.max_model_len, engine.options.page_size)
        if of_adapters < largest or pool.capacity - of_adapters < longest:
            raise ValueError(
                f"with a share of {share} adapters have {of_adapters} pages, KV cache "
                f"{pool.capacity - of_adapters}; the largest adapter needs {largest}, the longest "
                f"request {longest}: raise --pages"
            )
        cache = FixedSplit(pool, slots, manager.pages_of, manager.loader, adapter_pages=of_adapters)
    manager.cache = engine.scheduler.adapters = cache
