# SPDX-License-Identifier: Apache-2.0
"""Random histories of a small server, under any policy."""

from contextlib import nullcontext

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from slora_jax.pool.allocator import PageUse
from tests.scheduling.model import ADAPTER_PAGES, Host

FEW = st.integers(1, 4)
# Capacity, page size, rows, tokens beyond one a row, adapter slots, seconds of a step.
SIZES = st.tuples(
    st.integers(5, 12), FEW, st.integers(1, 6), st.integers(0, 16), FEW, st.sampled_from([0.1, 1.0])
)
# Prompt, most output, adapter, where it stops, priority.
ADAPTERS, STOPS = st.sampled_from([None, None, *ADAPTER_PAGES]), st.none() | st.integers(4, 24)
REQUESTS = st.tuples(st.integers(1, 16), st.integers(1, 32), ADAPTERS, STOPS, st.integers(-2, 2))


class ServingMachine(RuleBasedStateMachine):
    """Small pools and bursts of requests: whatever can run short does.

    After each step the host checks that no page, slot, adapter or request is lost; at the end all
    that was asked for is served, or turned away.
    """

    options: st.SearchStrategy[dict]  # of the scheduling

    @initialize(sizes=SIZES, data=st.data())
    def start(self, sizes: tuple, data: st.DataObject) -> None:
        self.host = Host(*sizes, **data.draw(self.options))

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=5))
    def add(self, requests: list[tuple]) -> None:
        for request in requests:
            self.host.add(*request)

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.host.step()

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.host.abort(data.draw(st.sampled_from(list(self.host.live))))

    @precondition(lambda self: self.host.cache.residents)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """As unloading does; a request that waits will have it installed again."""
        name, resident = data.draw(st.sampled_from([*self.host.cache.residents.items()]))
        with pytest.raises(RuntimeError, match="users") if resident.users else nullcontext():
            self.host.cache.evict(name)
        self.host.check()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.drain()
            assert self.host.pool.num_used(PageUse.KV) == 0
