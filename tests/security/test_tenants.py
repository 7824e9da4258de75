# SPDX-License-Identifier: Apache-2.0
"""One client's flood, and what it leaves to the others: places, shares, quotas, keys."""

import asyncio
import math
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.admission import Admission, Bucket, Place
from server.config import ServerConfig
from server.errors import HttpError, Invalid, TooManyRequests
from server.generation import Generation
from server.limits import Limits
from server.messages import Delta
from server.middleware import _ADMIN_PATHS
from server.routes import models
from slora_jax.core import FinishReason
from slora_jax.demo import BASE_MODEL
from tests.server.fake_engine import ANSWER, SILENCE
from tests.server.test_front_end import World, error, run

TENANTS = ("a", "b", "c")


def delta(request_id: str, reason: FinishReason | None = None) -> Delta:
    return Delta(request_id, [7], "x", reason, None, None, None)


class Queue(RuleBasedStateMachine):
    """Requests of three tenants come, begin, end and leave, against what fairness demands."""

    @initialize(queued=st.integers(0, 6), batch=st.integers(1, 3))
    def begin(self, queued: int, batch: int) -> None:
        self.batch = batch
        self.room = queued + batch
        self.admission = Admission(Limits(max_queued_requests=queued), lambda: 0.0)
        self.open: dict[Place, tuple[Any, Generation | None]] = {}
        self.begun: set[Place] = set()
        self.ended: dict[Place, int] = {}
        self.count = 0

    def held(self, tenant: str) -> int:
        return sum(place.size for place in self.open if place.tenant == tenant)

    @rule(tenant=st.sampled_from(TENANTS), choices=st.integers(1, 4), admitting=st.booleans())
    def ask(self, tenant: str, choices: int, admitting: bool) -> None:
        before = {place: place.size for place in self.open}
        held = {one: self.held(one) for one in TENANTS}
        context = self.admission.place(tenant, choices, self.batch)
        try:
            place = context.__enter__()
        except Invalid:
            assert choices > self.room
            assert before == {one: one.size for one in self.open}
            return
        except TooManyRequests as refusal:
            self.check_refusal(refusal, tenant, choices, held, before)
            return
        self.open[place] = (context, None)
        self.count += 1
        if not admitting:
            ids = [f"{self.count}-{n}" for n in range(choices)]
            generation = Generation(ids, [[1]] * choices, [None] * choices, 0.0)
            place.begin(generation)
            self.open[place] = (context, generation)
        for one, size in before.items():
            if one.size < size:
                assert one.size == 0
                assert one.tenant != tenant
                assert one not in self.begun
                assert held[one.tenant] > held[tenant] + choices, "taken from one with less"
                with pytest.raises(TooManyRequests):
                    one.check()

    def check_refusal(
        self,
        refusal: TooManyRequests,
        tenant: str,
        choices: int,
        held: dict[str, int],
        before: dict[Place, int],
    ) -> None:
        """It is full, what could be taken from tenants with more is not enough, and none was."""
        assert refusal.retry_after is not None
        assert before == {one: one.size for one in self.open}, "in vain, others were hurt"
        free = self.room - sum(held.values())
        for richer in [one for one in TENANTS if held[one] > held[tenant] + choices]:
            left = held[richer]
            for place in reversed([one for one in self.open if one.tenant == richer]):
                if place.size and place not in self.begun and left > held[tenant] + choices:
                    free += place.size
                    left -= place.size
        assert free < choices

    def live(self) -> list[tuple[Place, Generation]]:
        return [(p, g) for p, (_, g) in self.open.items() if g is not None and p.size]

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def token(self, data: st.DataObject) -> None:
        place, generation = data.draw(st.sampled_from(self.live()))
        unfinished = [n for n, c in enumerate(generation.choices) if not c.output.finished]
        index = data.draw(st.sampled_from(unfinished))
        reason = FinishReason.STOP if data.draw(st.booleans()) else None
        generation.add(index, delta(generation.ids[index], reason))
        self.begun.add(place)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(list(self.open)))
        context, _ = self.open.pop(place)
        context.__exit__(None, None, None)

    @invariant()
    def fits(self) -> None:
        if hasattr(self, "open"):
            assert sum(place.size for place in self.open) <= self.room


TestQueue = Queue.TestCase


def test_a_flood_displaces_only_itself():
    """Forty requests of one adapter fill the queue; another one's are all served."""

    async def story(one: World) -> None:
        flood = []
        for count in range(1, 13):  # in this order
            flood.append(asyncio.create_task(one.ask(SILENCE, model="base")))
            await one.until(lambda count=count: one.front.client.num_running == count)
        assert (await one.ask(SILENCE, max_tokens=1, model="base")).status_code == 429
        headers = {"Authorization": "Bearer two"}
        for _ in range(20):
            response = await one.client.post(
                "/v1/completions",
                json={"model": "base", "prompt": [ANSWER], "max_tokens": 3},
                headers=headers,
            )
            assert response.status_code == 200
        displaced = [task for task in flood if task.done()]
        assert len(displaced) == 1
        assert error(displaced[0].result())["type"] == "RateLimitError"
        assert int(displaced[0].result().headers["retry-after"]) >= 1
        assert flood[-1].done(), "the latest goes first"
        for task in flood:
            task.cancel()

    async def with_key(one: World) -> None:
        one.client.headers["Authorization"] = "Bearer one"
        await story(one)

    run(with_key, max_queued_requests=10, api_keys=("one", "two"))


def test_without_keys_an_adapter_is_a_tenant(tmp_path):
    async def story(one: World) -> None:
        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        assert (await one.client.post("/v1/load_lora_adapter", json=body)).status_code == 200
        flood = [asyncio.create_task(one.ask(SILENCE)) for _ in range(5)]
        await one.until(lambda: one.front.client.num_running == 5)
        assert (await one.ask()).status_code == 429
        assert (await one.ask(model="mine")).status_code == 200
        for task in flood:
            task.cancel()

    run(story, max_queued_requests=3, allow_runtime_lora_updating=True, lora_roots=(tmp_path,))


def test_a_tenants_own_limit():
    async def story(one: World) -> None:
        silent = asyncio.create_task(one.ask(SILENCE, n=2))
        await one.until(lambda: one.front.client.num_running == 2)
        assert "--max-tenant-requests" in error(await one.ask())["message"]
        silent.cancel()
        await one.until(lambda: one.front.client.num_running == 0)
        assert (await one.ask()).status_code == 200

    run(story, max_tenant_requests=2)


def test_quotas_of_requests_and_tokens():
    async def requests(one: World) -> None:
        assert [(await one.ask()).status_code for _ in range(3)] == [200, 200, 429]
        refused = await one.ask()
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert "--tenant-requests-per-minute" in error(refused)["message"]

    async def tokens(one: World) -> None:
        assert (await one.ask(prompt=[ANSWER] * 5, max_tokens=5)).status_code == 200
        refused = await one.ask()
        assert "--tenant-tokens-per-minute" in error(refused)["message"]
        assert int(refused.headers["retry-after"]) == pytest.approx(13, abs=1)

    run(requests, tenant_requests_per_minute=2)
    run(tokens, tenant_tokens_per_minute=9)


@pytest.mark.parametrize("rate", [0.5, 6, 600])
def test_a_bucket_fills_by_its_rate(rate):
    now = 0.0
    bucket = Bucket(rate, lambda: now)
    most = max(rate, 1)
    assert bucket.is_full
    assert bucket.wait_s == 0
    bucket.take(most + 2)
    wait = bucket.wait_s
    assert wait == pytest.approx(3 / rate * 60)
    now += wait / 2
    assert bucket.wait_s == pytest.approx(wait / 2)
    now += wait
    assert bucket.wait_s == 0
    assert not bucket.is_full or math.isclose(most, 1)
    now += 1000
    assert bucket.is_full


def test_quotas_of_idle_tenants_are_forgotten(monkeypatch):
    monkeypatch.setattr("server.admission._MOST_QUOTAS", 3)
    admission = Admission(Limits(tenant_tokens_per_minute=600), lambda: 0.0)
    for n in range(10):
        with admission.place(f"idle {n}", 1, 8):
            pass
    admission.charge("spender", 700)
    for n in range(10):
        with admission.place(f"idle {n}", 1, 8):
            pass
    assert len(admission._quotas) <= 4
    with pytest.raises(TooManyRequests), admission.place("spender", 1, 8):
        pass


def test_adapters_are_managed_under_a_key_of_their_own(tmp_path):
    async def story(one: World) -> None:
        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        for path in _ADMIN_PATHS:
            for key, status in (("", 401), ("client", 403), ("nobody", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                response = await one.client.post(path, json=body, headers=headers)
                assert response.status_code == status, (path, key)
        headers = {"Authorization": "Bearer admin"}
        assert (
            await one.client.post("/v1/load_lora_adapter", json=body, headers=headers)
        ).status_code == 200
        assert (await one.client.get("/v1/models", headers=headers)).status_code == 200

    keys = {"api_keys": ("client",), "admin_api_keys": ("admin",)}
    run(story, allow_runtime_lora_updating=True, lora_roots=(tmp_path,), **keys)


def test_an_admin_key_alone_leaves_the_rest_open(tmp_path):
    async def story(one: World) -> None:
        assert (await one.ask()).status_code == 200
        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        assert (await one.client.post("/v1/load_lora_adapter", json=body)).status_code == 401

    run(
        story,
        allow_runtime_lora_updating=True,
        lora_roots=(tmp_path,),
        admin_api_keys=("admin",),
    )


def test_every_route_that_changes_adapters_needs_the_admin_key():
    changing = {r.path for r in models.router.routes if "POST" in getattr(r, "methods", ())}
    assert changing == {*_ADMIN_PATHS}


def test_one_key_for_clients_and_management_must_be_meant(tmp_path):
    settings = {
        "model": BASE_MODEL,
        "served_model_names": ("base",),
        "allow_runtime_lora_updating": True,
        "lora_roots": (tmp_path,),
        "api_keys": ("client",),
    }
    with pytest.raises(ValueError, match="admin_api_keys must be given with api_keys"):
        ServerConfig(**settings)
    ServerConfig(**settings, admin_api_keys=("client",))


def test_a_request_that_is_turned_away_while_its_prompt_is_read():
    admission = Admission(Limits(max_queued_requests=1), lambda: 0.0)
    with admission.place("a", 1, 1) as first, admission.place("a", 1, 1) as second:
        second.check()
        with admission.place("b", 1, 1):
            first.check()
            with pytest.raises(HttpError):
                second.check()


def test_a_request_that_is_turned_away_at_last_does_not_reach_the_engine(monkeypatch):
    async def story(one: World) -> None:
        prompts_of = one.front.prompts.prompts_of

        async def slowly(*args: Any) -> list[list[int]]:
            for place in one.front.admission._places:
                place.turn_away(TooManyRequests("others have less"))
            return await prompts_of(*args)

        monkeypatch.setattr(one.front.prompts, "prompts_of", slowly)
        monkeypatch.setattr(one.front.client, "generate", None)
        assert "others have less" in error(await one.ask())["message"]

    run(story)


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1), (1.0, 20), (1000.0, 1), (0.1, 60)])
def test_when_to_try_again(rate, seconds):
    """When half of the forty that wait will have ended."""
    admission = Admission(Limits(max_queued_requests=39), lambda: rate)
    with admission.place("a", 40, 1):
        with pytest.raises(TooManyRequests) as refusal, admission.place("a", 1, 1):
            pass
        assert refusal.value.retry_after == seconds
