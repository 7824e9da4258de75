# SPDX-License-Identifier: Apache-2.0
"""Adapters are loaded, replaced, pinned, unloaded and lost in any order, while requests run.

Whatever happens, a request runs with the weights that its adapter's name stood for when it came:
the device of `tests.scheduling.model` looks at every page it reads.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.adapters.errors import AdapterError
from slora_jax.scheduling.options import POLICIES
from tests.adapters.world import PAGE_BYTES, AdapterHost

NAMES = st.sampled_from(["a", "b", "c", "d"])
PATHS = st.sampled_from(["/0", "/1", "/2"])
CONTENTS = st.sampled_from(["x", "y", "z"])
FEW = st.integers(1, 4)
MOST_PAGES = 3


class AdapterMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(6, 20),
        page_size=FEW,
        rows=FEW,
        slots=FEW,
        staging=st.integers(MOST_PAGES, 6),
        host=st.integers(MOST_PAGES, 9),
        most=st.none() | FEW,
        policy=st.sampled_from(POLICIES),
        ahead=FEW,
    )
    def start(self, capacity, page_size, rows, slots, staging, host, most, policy, ahead):
        self.host = AdapterHost(
            capacity,
            page_size,
            rows,
            8,
            slots,
            staging_pages=staging,
            max_cpu_loras=most,
            max_bytes=host * PAGE_BYTES,
            scheduling_policy=policy,
            prefetch_lookahead=ahead,
        )
        self.manager, self.store = self.host.manager, self.host.manager.store
        self.unloading: list = []  # futures, and the versions they wait for
        for number, name in enumerate("abc"):
            self.manager.load(name, self.host.disk.write(f"/{number}", name, number % 3 + 1))

    # Files

    @rule(path=PATHS, content=CONTENTS, pages=st.integers(1, MOST_PAGES))
    def write(self, path, content, pages):
        self.host.disk.write(path, content, pages)

    @rule(path=PATHS)
    def remove(self, path):
        self.host.disk.files = {p: a for p, a in self.host.disk.files.items() if str(p) != path}

    # Names

    @rule(name=NAMES, path=PATHS, replace=st.booleans(), pinned=st.booleans())
    def load(self, name, path, replace, pinned):
        before = {one: self.store[one] for one in self.store}
        try:
            self.manager.load(name, path, replace=replace, pinned=pinned)
        except AdapterError:
            assert {one: self.store[one] for one in self.store} == before
            return
        assert replace or name not in before
        assert self.store[name].version.id == self.host.disk.read(path).id
        assert self.store[name].pinned == pinned

    @precondition(lambda self: len(self.store))
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.store)))
        self.unloading.append((self.manager.unload(name), self.store.versions))
        assert name not in self.store
        with pytest.raises(AdapterError, match="cannot be found"):
            self.manager.unload(name)

    @precondition(lambda self: len(self.store))
    @rule(data=st.data())
    def pin(self, data):
        name = data.draw(st.sampled_from(sorted(self.store)))
        before = self.store[name].pinned
        try:
            self.manager.pin(name)
        except AdapterError:
            assert self.store[name].pinned == before
        else:
            assert self.store[name].version.id in self.host.cache

    @precondition(lambda self: len(self.store))
    @rule(data=st.data())
    def unpin(self, data):
        self.manager.unpin(data.draw(st.sampled_from(sorted(self.store))))

    # Requests

    @rule(data=st.data(), prompt=st.integers(1, 8), output=st.integers(1, 12), count=FEW)
    def ask(self, data, prompt, output, count):
        for _ in range(count):
            name = data.draw(st.sampled_from([None, *sorted(self.store)]))
            self.host.ask(name, prompt, output)

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def abort(self, data):
        self.host.abort(data.draw(st.sampled_from(list(self.host.live))))

    # Time

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.host.step()

    @rule(count=st.integers(1, 6))
    def fast_steps(self, count):
        for _ in range(count):
            self.host.let_all_come()
            self.host.step()

    @precondition(lambda self: self.host.threads.waiting)
    @rule(index=st.integers(0, 3))
    def read(self, index):
        self.host.threads.run_one(index)

    @precondition(lambda self: self.host.copies)
    @rule(data=st.data())
    def copy(self, data):
        data.draw(st.sampled_from(self.host.copies)).done = True

    @invariant()
    def books_agree(self):
        if hasattr(self, "host"):
            self.host.check()
            for gone, versions in self.unloading:
                assert gone.done() or any(v.users and not v.names for v in versions)

    def teardown(self):
        if not hasattr(self, "host"):
            return
        for _ in range(2000):
            if not self.host.live:
                break
            self.host.let_all_come()
            self.host.step()
        assert not self.host.live, "a request starves"
        lost = {request.adapter_id for request, _ in self.host.failed}
        assert all(lost), "a request for the base model was lost"
        for name in list(self.store):
            self.unloading.append((self.manager.unload(name), []))
        self.manager.store.tell()
        assert all(gone.done() for gone, _ in self.unloading)
        assert self.host.pool.num_free == self.host.pool.capacity, "pages are lost"
        self.host.let_all_come()
        self.manager.host.poll()
        assert self.manager.host.nbytes == 0, "host memory is lost"
        assert not self.store.versions


TestAdapterMachine = AdapterMachine.TestCase
TestAdapterMachine.settings = settings(max_examples=200, stateful_step_count=50)
