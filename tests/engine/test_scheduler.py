# SPDX-License-Identifier: Apache-2.0
"""The scheduler, the pool and the adapter cache, run against a simulated device.

The device keeps what it is told to keep, token by token and page by page, so a page given to two
owners, a token computed at the wrong place or an adapter written over shows up as a wrong read.
"""

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from slora_jax.adapters.residency import AdapterCache
from slora_jax.core import FROM_DEVICE, Request, RowPlan, SamplingParams, StepPlan
from slora_jax.engine.scheduler import Scheduler
from slora_jax.pool.allocator import PagePool, PageUse

ADAPTER_PAGES = {None: 0, "one": 1, "uno": 1, "two": 2, "three": 3, "four": 4}


@cache
def token_at(request_id: str, position: int) -> int:
    """The token of a request at a position of prompt or output; no two are alike."""
    return zlib.crc32(f"{request_id} {position}".encode())


class Device:
    """Memory as the compiled programs leave it: installs, then page updates, then the rows."""

    def __init__(self, num_pages: int, page_size: int):
        self.pages: list[dict[int, object]] = [{} for _ in range(num_pages)]
        self._page_size = page_size
        self._page_table: dict[tuple[int, int], int] = {}
        self._adapter_pages: dict[int | None, tuple[int, ...]] = {None: ()}
        self._last_token: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        """Does a step and returns every row's next token."""
        for install in plan.installs:
            for index, page in enumerate(install.pages):
                self.pages[page] = {0: (install.adapter, index)}
            self._adapter_pages[install.adapter_slot] = install.pages
        for slot, column, page in plan.page_updates:
            self._page_table[slot, column] = page
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                page, offset = self._place(row.slot, position)
                page[offset] = self._last_token[row.slot] if token == FROM_DEVICE else token
        return [self._next_token(row) for row in plan.rows]

    def _place(self, slot: int, position: int) -> tuple[dict[int, object], int]:
        column, offset = divmod(position, self._page_size)
        return self.pages[self._page_table[slot, column]], offset

    def _next_token(self, row: RowPlan) -> int:
        end = row.start + len(row.tokens)
        places = [self._place(row.slot, position) for position in range(end)]
        context = [page.get(offset) for page, offset in places]
        assert context == [token_at(row.request.id, position) for position in range(end)]
        name = row.request.adapter
        adapter = [self.pages[page] for page in self._adapter_pages[row.adapter_slot]]
        assert adapter == [{0: (name, index)} for index in range(ADAPTER_PAGES[name])]
        token = token_at(row.request.id, end)
        if row.samples:
            assert row.position == end - len(row.request.prompt)
            self._last_token[row.slot] = token
        return token


class Host:
    """Drives the scheduler as `Engine` does: a step's tokens are read after the next is planned."""

    def __init__(self, capacity=20, page_size=4, max_num_seqs=4, spare_tokens=12, adapter_slots=4):
        self.page_size, self.max_num_seqs = page_size, max_num_seqs
        self.budget, self.adapter_slots = max_num_seqs + spare_tokens, adapter_slots
        self.pool = PagePool(capacity + 1)
        self.cache = AdapterCache(self.pool, adapter_slots, ADAPTER_PAGES.__getitem__)
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": self.budget}
        self.scheduler = Scheduler(self.pool, self.cache, page_size=page_size, **limits)
        self.device = Device(capacity + 1, page_size)
        self.live: dict[Request, int] = {}  # by arrival: the length at which each will stop
        self.added = 0
        self._unread: tuple[StepPlan, list[int]] | None = None

    def add(self, prompt: int, max_output=1, adapter=None, stops_after=None) -> Request:
        """A request of that many prompt tokens, cut to what the pool can hold at all."""
        most = (self.pool.capacity - ADAPTER_PAGES[adapter]) * self.page_size
        prompt = min(prompt, most)
        max_output = min(max_output, most - prompt + 1)
        name = f"request {self.added}"
        tokens = [token_at(name, position) for position in range(prompt)]
        request = Request(
            id=name, prompt=tokens, params=SamplingParams(), adapter=adapter, max_output=max_output
        )
        self.added += 1
        self.live[request] = min(stops_after or max_output, max_output)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        del self.live[request]
        self.scheduler.finish(request)
        self.check()

    def step(self) -> StepPlan | None:
        decoding = [r for r in self.scheduler.running if r.num_to_compute == 1]
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan, decoding)
        previous, self._unread = self._unread, plan and (plan, self.device.run(plan))
        assert plan or previous or not self.live, "requests wait, but none can run"
        if previous is not None:
            self._read(*previous)
        self.check()
        return plan

    def step_until(self, done: Callable[[], bool], bound: int = 100) -> None:
        while not done():
            assert bound > 0, "some request starves"
            bound -= 1
            self.step()

    def drain(self) -> None:
        """Runs to the end. The first request in line gets a token at least in every other step."""
        bound = sum(len(r.prompt) + 2 * r.max_output + 4 for r in self.live)
        self.step_until(lambda: not self.live, bound)

    def check(self) -> None:
        self.scheduler.check(self.max_num_seqs, self.adapter_slots)
        assert list(self.scheduler.requests) == list(self.live), "not first come, first served"
        assert self.device.pages[0] == {}, "the reserved page was written"

    def _read(self, plan: StepPlan, tokens: list[int]) -> None:
        for row, token in zip(plan.rows, tokens, strict=True):
            request = row.request
            request.in_flight -= row.samples
            if not row.samples or request not in self.live:
                continue
            request.output.append(token)
            assert token == token_at(request.id, len(request.prompt) + len(request.output) - 1)
            if len(request.output) == self.live[request]:
                del self.live[request]
                self.scheduler.finish(request)

    def _check_plan(self, plan: StepPlan, decoding: list[Request]) -> None:
        planned = [row.request for row in plan.rows]
        order = [(row.adapter_slot is None, row.adapter_slot or 0) for row in plan.rows]
        assert order == sorted(order), "rows of one adapter are not together, or base is not last"
        assert len(set(planned)) == len(planned) <= self.max_num_seqs
        assert set(plan.started) == {row.request for row in plan.rows if row.start == 0}
        assert all(row.tokens for row in plan.rows)
        assert plan.num_tokens <= self.budget
        assert len(plan.page_updates) <= plan.num_tokens // self.page_size + len(plan.rows)
        places = [(slot, column) for slot, column, _ in plan.page_updates]
        assert len(set(places)) == len(places), "two updates of one entry race on the device"
        for request in decoding:
            assert request in planned or request.slot is None, "a decode waits for prompts"


FEW = st.integers(1, 4)
# Capacity, page size, rows, tokens beyond one a row, adapter slots.
HOSTS = st.builds(Host, st.integers(5, 12), FEW, st.integers(1, 6), st.integers(0, 16), FEW)
# Prompt, most output, adapter, where it stops.
ADAPTERS, STOPS = st.sampled_from([None, None, *ADAPTER_PAGES]), st.none() | st.integers(4, 24)
REQUESTS = st.tuples(st.integers(1, 16), st.integers(1, 32), ADAPTERS, STOPS)


class ServingMachine(RuleBasedStateMachine):
    """Small pools and bursts of requests: whatever can run short does."""

    @initialize(host=HOSTS)
    def start(self, host: Host) -> None:
        self.host = host

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


TestServing = ServingMachine.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def requests_of(plan: StepPlan | None) -> set[Request]:
    return {row.request for row in plan.rows} if plan else set()


def test_decodes_come_first_and_prompts_share_the_rest():
    host = Host(spare_tokens=4)
    decoding = host.add(2, max_output=5)
    host.step()
    first, second = host.add(5), host.add(9)
    plan = host.step()
    assert (
        {row.request: row.tokens for row in plan.rows}
        == {
            decoding: (FROM_DEVICE,),  # its first token has not been read yet
            first: tuple(first.prompt),
            second: tuple(second.prompt[:2]),
        }
    )
    assert {row.request: len(row.tokens) for row in plan.rows} == {decoding: 1, first: 5, second: 2}
    assert {row.request for row in plan.rows if row.samples} == {decoding, first}


def test_admission_is_optimistic_and_the_request_admitted_last_pays_for_it():
    host = Host(capacity=9, spare_tokens=28)
    requests = [host.add(8, max_output=8) for _ in range(3)]  # they grow to four pages each
    assert requests_of(host.step()) == set(requests)
    host.step_until(lambda: host.scheduler.num_preemptions > 0)
    assert [r.num_preemptions for r in requests] == [0, 0, 1]
    host.drain()


def test_admission_leaves_room_for_the_first_decode():
    host = Host(capacity=3)
    first = host.add(5, max_output=4)
    second = host.add(4, max_output=4)  # the free page would hold its prompt and no more
    assert requests_of(host.step()) == {first}
    host.abort(first)
    assert requests_of(host.step()) == {second}


def test_requests_admitted_together_all_have_room_for_their_first_decode():
    host = Host(capacity=3)
    for _ in range(2):
        host.add(4, max_output=4)
    host.step()
    host.step()
    assert host.scheduler.num_preemptions == 0


def test_a_pool_of_exactly_the_right_size_is_enough():
    host = Host(capacity=4 + 3)
    host.add(10, max_output=7, adapter="four")  # the last token sampled is never computed
    host.drain()
    assert host.scheduler.num_preemptions == 0


def test_a_preempted_request_waits_for_its_tokens_in_flight():
    host = Host(capacity=4)
    first, late = host.add(7, max_output=9), host.add(7, max_output=9)
    while not late.num_preemptions:
        assert host.scheduler.schedule() is not None  # and nothing is read
    assert late.in_flight > 0
    host.abort(first)
    assert host.scheduler.schedule() is None


@pytest.mark.parametrize(("capacity", "adapter_slots"), [(4, 4), (20, 2)])
def test_the_adapter_unused_longest_goes_first(capacity, adapter_slots):
    """Whether it is pages that run out or slots; the others stay."""
    host = Host(capacity, adapter_slots=adapter_slots)
    for name in ("one", "uno", "one", "two"):
        host.add(4, adapter=name)
        host.drain()
    assert list(host.cache.residents) == ["one", "two"]


def test_an_adapter_used_until_now_outlives_one_that_was_idle():
    host = Host(adapter_slots=2)
    user = host.add(4, max_output=9, adapter="one")
    host.add(4, adapter="two")
    host.step_until(lambda: user not in host.live)
    host.add(4, adapter="three")
    host.step()
    assert list(host.cache.residents) == ["one", "three"]
