# SPDX-License-Identifier: Apache-2.0
"""Which requests run in the next step, with how many tokens, on which pages.

Iteration-level scheduling: every step, each decoding request gets one token, prompts get the rest
of the token budget in chunks, and waiting requests are admitted while rows, pages and adapter slots
last, in the order that a policy wants. Who finds no room is skipped for a while, and then overtaken
no more, so nobody starves. Who waits for an adapter that is still on its way to the device is
passed for as long as that takes: the adapters of those next in line are fetched while steps run.
Output lengths are unknown, so admission is optimistic: when pages run out, the request admitted
last is preempted and later computed again.

The host plans a step before it has read the previous one's tokens. That is safe because the device
runs steps in order: pages released here may still be written by a step in flight, but only before
any step planned later touches them.
"""

import time
from bisect import insort_right
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from slora_jax.adapters.residency import AdapterCache
from slora_jax.core import Install, Rejection, Request, RowPlan, StepPlan
from slora_jax.pool.allocator import PagePool, PageUse
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.policies import Policy
from slora_jax.scheduling.queue import WaitingQueue


class Scheduler:
    """The queue of waiting requests and the batch of running ones.

    Args:
        pool: the pages.
        adapters: the adapters in the pool.
        page_size: tokens of a KV page.
        max_num_seqs: most requests in the batch.
        max_num_batched_tokens: most tokens of a step; at least `max_num_seqs`.
        policy: who is admitted next; None: first come, first served.
        clock: seconds that pass; another one in simulations.
    """

    def __init__(
        self,
        pool: PagePool,
        adapters: AdapterCache,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.policy = policy or Policy(SchedulingOptions())
        self._clock = clock
        self._pool = pool
        self.adapters = adapters
        self._page_size = page_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # by the policy's seniority, of equals by admission
        self.num_preemptions = 0
        self._rejections: list[Rejection] = []
        self._upcoming: tuple[str, ...] = ()  # adapters of those next in line
        self._upcoming_changed = False

    @property
    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> None:
        """Queues a request. Its pages, all in all, must fit the pool: the engine has checked."""
        request.arrival = self._clock()
        self.policy.arrived(request, self.waiting)
        self.waiting.add(request)
        self._upcoming_changed = True

    def finish(self, request: Request) -> None:
        """Forgets a request, running or waiting, and frees all it holds."""
        if request.slot is None:
            self.waiting.remove(request)
            self.policy.left(request, self.waiting)
            self._upcoming_changed = True
        else:
            self._stop(request)

    def preempt(self, request: Request) -> None:
        """Takes a running request out of the batch, to be computed again from its tokens."""
        self._stop(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(request)
        self._upcoming_changed = True

    def schedule(self) -> StepPlan | None:
        """Plans a step and takes it as dispatched; None if nothing can run now.

        Whom the policy turned away is forgotten: `take_rejections` says so, once.
        """
        now = self._clock()
        for rejection in self.policy.hopeless(self.waiting, now):
            self.finish(rejection.request)
            self._rejections.append(rejection)
        plan = _Draft()
        preempted = self.num_preemptions
        budget = self._plan_running(plan)
        if preempted == self.num_preemptions:
            self._plan_waiting(plan, budget, now)
        self._prefetch(now)
        finished = plan.finish()
        if finished is not None:
            self.policy.planned(finished)
        return finished

    def take_rejections(self) -> list[Rejection]:
        """Requests that the policy turned away since the last call."""
        rejections, self._rejections = self._rejections, []
        return rejections

    def _plan_running(self, plan: "_Draft") -> int:
        """Gives the batch its tokens; returns how many the step has left."""
        wanted = [request.num_to_compute for request in self.running]
        budget = self._max_num_batched_tokens - wanted.count(1)
        for request, tokens in zip(tuple(self.running), wanted, strict=True):
            chunk = 1 if tokens == 1 else min(tokens, budget)
            if request.slot is None or chunk == 0 or not self._grow(request, chunk, plan):
                continue
            budget -= chunk if tokens > 1 else 0
            plan.add(request, chunk, self._adapter_slot(request))
        return budget

    def _plan_waiting(self, plan: "_Draft", budget: int, now: float) -> None:
        """Admits who fits, in the policy's order, with what is left of the step's tokens."""
        if not (self.waiting and self._free_slots and budget > 0):
            return
        # Without room; without an adapter yet: they keep nobody waiting, but are overtaken as well.
        policy, passed, loading = self.policy, list[Request](), list[Request]()
        promised = sum(map(self._missing_pages, self.running))
        if self.running:  # else one that needs the whole pool would wait for ever
            promised += int(policy.options.admission_watermark * self._pool.capacity)
        room = self.adapters.room
        if promised >= room:
            return  # everybody needs a page
        for request in policy.candidates(self.waiting, self.running, now):
            if request.in_flight:
                break  # a preempted request's last token may still be on its way
            if request.adapter_id and not self.adapters.is_available(request.adapter_id):
                self._upcoming_changed = True  # or nobody might ever fetch it
                if len(loading) >= policy.options.prefetch_lookahead:
                    break
                loading.append(request)
                continue
            pages = self._missing_pages(request)
            fits = promised + pages <= room
            if fits and self._admit(request, promised + pages, passed + loading, plan, now):
                chunk = min(request.num_to_compute, budget)
                if not self._grow(request, chunk, plan):
                    raise AssertionError("admission promised pages that are not there")
                promised += self._missing_pages(request)
                room = self.adapters.room
                budget -= chunk
                plan.add(request, chunk, self._adapter_slot(request))
                if not (self._free_slots and budget > 0) or any(map(policy.is_starved, passed)):
                    break
            elif policy.is_starved(request) or len(passed) >= policy.options.scheduling_lookahead:
                break
            else:
                passed.append(request)

    def _prefetch(self, now: float) -> None:
        """Has the adapters of those next in line brought near, in the policy's order."""
        if self._upcoming_changed:
            line = self.policy.candidates(self.waiting, self.running, now)
            line = islice(line, self.policy.options.prefetch_lookahead)
            self._upcoming = tuple(dict.fromkeys(r.adapter_id for r in line if r.adapter_id))
            self._upcoming_changed = False
        self.adapters.prefetch(self._upcoming)

    def _admit(
        self, request: Request, reserve: int, passed: list[Request], plan: "_Draft", now: float
    ) -> bool:
        """Gives a waiting request a slot and its adapter, if its tokens so far have room.

        Room beside what the running requests will need: an admission should not preempt anybody
        a step later.

        Args:
            request: the candidate.
            reserve: pages that it and the running requests lack.
            passed: candidates before it that found no room, or whose adapters are on their way.
            plan: the step.
            now: seconds on the clock.
        """
        if request.adapter_id is None:
            if not self.adapters.make_room(reserve):
                return False
        else:
            acquired = self.adapters.acquire(request.adapter_id, reserve=reserve)
            if acquired is None:
                return False
            plan.installs += [acquired[1]] if acquired[1] else []
        self.policy.admitted(request, passed, self.waiting)
        self.waiting.remove(request)
        self.policy.left(request, self.waiting)
        self._upcoming_changed = True
        request.overtaken = 0
        request.admitted = now if request.admitted is None else request.admitted
        request.slot = self._free_slots.pop()
        insort_right(self.running, request, key=self.policy.seniority)
        plan.started.append(request)
        return True

    def _missing_pages(self, request: Request) -> int:
        """Pages that a request lacks for its tokens so far and the next one, sampled or not yet."""
        output = min(len(request.output) + (request.in_flight or 1), request.max_output - 1)
        tokens = len(request.prompt) + output
        return max(-(-tokens // self._page_size) - len(request.pages), 0)

    def _grow(self, request: Request, tokens: int, plan: "_Draft") -> bool:
        """Makes pages for the next `tokens` tokens, preempting later requests if it must.

        Returns:
            False if the request itself, being the last, had to be preempted.
        """
        wanted = -(-(request.num_computed + tokens) // self._page_size) - len(request.pages)
        if wanted == 0:
            return True  # as for nearly all rows
        while not self.adapters.make_room(wanted):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        assert request.slot is not None
        for page in self._pool.allocate(wanted, PageUse.KV):
            plan.page_updates.append((request.slot, len(request.pages), page))
            request.pages.append(page)
        return True

    def _stop(self, request: Request) -> None:
        """Takes a request out of the batch and frees what it holds."""
        assert request.slot is not None
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = None
        self._pool.release(request.pages)
        request.pages = []
        if request.adapter_id is not None:
            self.adapters.release(request.adapter_id)

    def _adapter_slot(self, request: Request) -> int | None:
        one = request.adapter_id
        return None if one is None else self.adapters.get(one).slot

    def check(self, num_slots: int, num_adapter_slots: int) -> None:
        """Raises AssertionError unless every page, slot and adapter is accounted for."""
        running = self.running
        residents = self.adapters.residents
        self._pool.check((r.pages for r in running), (a.pages for a in residents.values()))
        users = Counter(r.adapter_id for r in running if r.adapter_id is not None)
        self.adapters.check(dict(users), num_adapter_slots)
        slots = [r.slot for r in running if r.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(num_slots)), "a slot of the batch is lost or shared"
        for request in running:
            held = -(-request.num_computed // self._page_size)
            assert len(request.pages) == held, f"{request.id} holds {len(request.pages)} pages"
        for request in self.waiting:
            assert not request.pages, f"{request.id} waits but holds pages"
            assert request.slot is None, f"{request.id} waits but holds a slot"
            assert request.num_computed == 0, f"{request.id} waits with computed tokens"


class _Draft:
    """A step plan in the making."""

    def __init__(self) -> None:
        self.rows: list[RowPlan] = []
        self.page_updates: list[tuple[int, int, int]] = []
        self.installs: list[Install] = []
        self.started: list[Request] = []

    def add(self, request: Request, length: int, adapter_slot: int | None) -> None:
        """Adds a row and counts its tokens as computed, and its sample as in flight."""
        assert request.slot is not None
        start, output = request.num_computed, request.num_output
        samples = start + length == len(request.prompt) + output
        tokens = request.tokens_from(start, length)
        self.rows.append(
            RowPlan(request, request.slot, adapter_slot, start, tokens, samples, output)
        )
        request.num_computed += length
        request.in_flight += samples

    def finish(self) -> StepPlan | None:
        if not self.rows:
            return None
        # The kernels work on runs of tokens that share an adapter; the base model's come last.
        order = sorted(self.rows, key=lambda row: (row.adapter_slot is None, row.adapter_slot or 0))
        return StepPlan(
            tuple(order), tuple(self.page_updates), tuple(self.installs), tuple(self.started)
        )
