# SPDX-License-Identifier: Apache-2.0
"""The scheduler, strictly first come, first served, against a model of the device's memory."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from slora_jax.core import FROM_DEVICE, Request, StepPlan
from tests.scheduling.machine import ServingMachine
from tests.scheduling.model import Host


class StrictMachine(ServingMachine):
    options = st.just({"max_overtakes": 0})


TestServing = StrictMachine.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=60)


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
