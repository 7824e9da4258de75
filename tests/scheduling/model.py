# SPDX-License-Identifier: Apache-2.0
"""A simulated device and its host: the scheduler, the pool and the adapter cache run against them.

The device keeps what it is told to keep, token by token and page by page, so a page given to two
owners, a token computed at the wrong place or an adapter written over shows up as a wrong read.
"""

import zlib
from collections.abc import Callable
from functools import cache

from slora_jax.adapters.residency import AdapterCache
from slora_jax.core import (
    FROM_DEVICE,
    Install,
    Rejection,
    Request,
    RowPlan,
    SamplingParams,
    StepPlan,
)
from slora_jax.pool.allocator import PagePool
from slora_jax.scheduling.choice import make_policy
from slora_jax.scheduling.cost_model import CostModel
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.scheduler import Scheduler

ADAPTER_PAGES = {None: 0, "one": 1, "uno": 1, "two": 2, "three": 3, "four": 4}


@cache
def token_at(request_id: str, position: int) -> int:
    """The token of a request at a position of prompt or output; no two are alike."""
    return zlib.crc32(f"{request_id} {position}".encode())


class Device:
    """Memory as the compiled programs leave it: installs, then page updates, then the rows."""

    def __init__(self, num_pages: int, page_size: int, pages_of: Callable[[str], int]):
        self._pages_of = pages_of
        self.pages: list[dict[int, object]] = [{} for _ in range(num_pages)]
        self._page_size = page_size
        self._page_table: dict[tuple[int, int], int] = {}
        self._adapter_pages: dict[int | None, tuple[int, ...]] = {None: ()}
        self._last_token: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        """Does a step and returns every row's next token."""
        for install in plan.installs:
            self.install(install)
        for slot, column, page in plan.page_updates:
            self._page_table[slot, column] = page
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                page, offset = self._place(row.slot, position)
                page[offset] = self._last_token[row.slot] if token == FROM_DEVICE else token
        return [self._next_token(row) for row in plan.rows]

    def install(self, install: Install) -> None:
        for index, page in enumerate(install.pages):
            self.pages[page] = {0: (install.adapter_id, index)}
        self._adapter_pages[install.adapter_slot] = install.pages

    def _place(self, slot: int, position: int) -> tuple[dict[int, object], int]:
        column, offset = divmod(position, self._page_size)
        return self.pages[self._page_table[slot, column]], offset

    def _next_token(self, row: RowPlan) -> int:
        end = row.start + len(row.tokens)
        places = [self._place(row.slot, position) for position in range(end)]
        context = [page.get(offset) for page, offset in places]
        assert context == [token_at(row.request.id, position) for position in range(end)]
        name = row.request.adapter_id
        adapter = [self.pages[page] for page in self._adapter_pages[row.adapter_slot]]
        assert adapter == [
            {0: (name, index)} for index in range((name and self._pages_of(name)) or 0)
        ]
        token = token_at(row.request.id, end)
        if row.samples:
            assert row.position == end - len(row.request.prompt)
            self._last_token[row.slot] = token
        return token


class Host:
    """Drives the scheduler as `Engine` does: a step's tokens are read after the next is planned.

    A step takes `step_s` seconds. Other options are the scheduling's; nobody overtakes by default.
    """

    def __init__(
        self,
        capacity=20,
        page_size=4,
        max_num_seqs=4,
        spare_tokens=12,
        adapter_slots=4,
        step_s=1.0,
        **options,
    ):
        self.options = SchedulingOptions(**{"max_overtakes": 0, **options})
        self.now, self.step_s = 0.0, step_s
        self.page_size, self.max_num_seqs = page_size, max_num_seqs
        self.budget, self.adapter_slots = max_num_seqs + spare_tokens, adapter_slots
        self.pool = PagePool(capacity + 1)
        self.device = Device(capacity + 1, page_size, self.pages_of)
        self.cache = self.make_cache()
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": self.budget}
        self.policy = make_policy(self.options, CostModel(), self.budget)
        self.scheduler = Scheduler(
            self.pool,
            self.cache,
            page_size=page_size,
            policy=self.policy,
            clock=lambda: self.now,
            **limits,
        )
        self.live: dict[Request, int] = {}  # by arrival: the length at which each will stop
        self.added = 0
        self.rejected: list[Rejection] = []
        self.overtakers: dict[Request, int] = {}  # of requests never admitted yet
        self.admitted: list[Request] = []  # for the first time, in order
        self._unread: tuple[StepPlan, list[int]] | None = None

    def pages_of(self, adapter_id: str) -> int:
        return ADAPTER_PAGES[adapter_id]

    def make_cache(self) -> AdapterCache:
        return AdapterCache(self.pool, self.adapter_slots, self.pages_of)

    def waits_for_adapters(self) -> bool:
        """Whether nothing may run now, because adapters are on their way."""
        return False

    def run(self, plan: StepPlan) -> list[int]:
        return self.device.run(plan)

    def ended(self, request: Request) -> None:
        """The scheduler has forgotten a request."""

    def add(self, prompt: int, max_output=1, adapter=None, stops_after=None, priority=0) -> Request:
        """A request of that many prompt tokens, cut to what the pool can hold at all."""
        most = (self.pool.capacity - ADAPTER_PAGES[adapter]) * self.page_size
        prompt = min(prompt, most)
        max_output = min(max_output, most - prompt + 1)
        request = self.make(prompt, max_output, adapter, adapter)
        request.priority = priority
        self.enter(request, stops_after)
        return request

    def make(
        self, prompt: int, max_output: int, adapter: str | None, adapter_id: str | None
    ) -> Request:
        name = f"request {self.added}"
        self.added += 1
        return Request(
            id=name,
            prompt=[token_at(name, position) for position in range(prompt)],
            params=SamplingParams(),
            adapter=adapter,
            adapter_id=adapter_id,
            max_output=max_output,
        )

    def enter(self, request: Request, stops_after: int | None = None) -> None:
        self.live[request] = min(stops_after or request.max_output, request.max_output)
        self.overtakers[request] = 0
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        del self.live[request]
        self.overtakers.pop(request, None)
        self.scheduler.finish(request)
        self.ended(request)
        self.check()

    def step(self) -> StepPlan | None:
        decoding = [r for r in self.scheduler.running if r.num_to_compute == 1]
        plan = self.scheduler.schedule()
        for rejection in self.scheduler.take_rejections():
            self.rejected.append(rejection)
            del self.live[rejection.request]
            self.overtakers.pop(rejection.request, None)  # it may have begun, and been preempted
            self.ended(rejection.request)
        self._count_overtakers(plan)
        if plan is not None:
            self._check_plan(plan, decoding)
        previous, self._unread = self._unread, plan and (plan, self.run(plan))
        if not (plan or previous or not self.live):
            assert self.waits_for_adapters(), "requests wait, but none can run"
        if previous is not None:
            self._read(*previous)
        self.now += self.step_s
        self.check()
        return plan

    def step_until(self, done: Callable[[], bool], bound: int = 100) -> None:
        while not done():
            assert bound > 0, "some request starves"
            bound -= 1
            self.step()

    def drain(self) -> None:
        """Runs to the end. The first request in line gets a token at least in every other step."""
        first_come = self.options.scheduling_policy == "fcfs" and self.options.max_overtakes == 0
        again = 1 if first_come else 3  # others may have been preempted, at any length, before
        bound = again * sum(len(r.prompt) + 2 * r.max_output + 4 for r in self.live)
        self.step_until(lambda: not self.live, bound)

    def check(self) -> None:
        self.scheduler.check(self.max_num_seqs, self.adapter_slots)
        requests = list(self.scheduler.requests)
        if self.options.scheduling_policy == "fcfs" and self.options.max_overtakes == 0:
            assert requests == list(self.live), "not first come, first served"
        assert len(requests) == len(self.live), "a request is lost, or there twice"
        assert set(requests) == set(self.live), "a request is lost"
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
                self.ended(request)

    def _count_overtakers(self, plan: StepPlan | None) -> None:
        """Who was admitted for the first time, past whom that came earlier and still waits."""
        started = plan.started if plan is not None else ()
        new = [request for request in started if request in self.overtakers]
        for request in new:
            del self.overtakers[request]
        self.admitted += new
        order = {request: n for n, request in enumerate(self.live)}
        for request in self.overtakers:
            self.overtakers[request] += sum(order[request] < order[one] for one in new)

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
