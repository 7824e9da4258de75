# SPDX-License-Identifier: Apache-2.0
"""What each policy promises, in random histories and in small scenes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, run_state_machine_as_test

from slora_jax.core import Request, SamplingParams
from slora_jax.scheduling.cost_model import CostModel, StepLoad
from slora_jax.scheduling.early_abort import EarlyAbort, SmoothedRate
from slora_jax.scheduling.options import POLICIES, SchedulingOptions
from slora_jax.scheduling.queue import WaitingQueue
from tests.scheduling.machine import ServingMachine
from tests.scheduling.model import Host

OVERTAKES = st.integers(0, 4)


def options(policy: str, **others: st.SearchStrategy) -> st.SearchStrategy[dict]:
    lookahead = st.integers(0, 5)
    return st.fixed_dictionaries(
        {
            "scheduling_policy": st.just(policy),
            "max_overtakes": OVERTAKES,
            "scheduling_lookahead": lookahead,
            **others,
        }
    )


class BoundedOvertaking(ServingMachine):
    """Nobody waits while more than `max_overtakes` later requests begin."""

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def few_overtake(self) -> None:
        assert all(n <= self.host.options.max_overtakes for n in self.host.overtakers.values())


class FcfsMachine(BoundedOvertaking):
    options = options("fcfs")


class ClusterMachine(BoundedOvertaking):
    options = options(
        "cluster",
        cluster_adapters=st.integers(1, 3),
        cluster_mode=st.sampled_from(["soft", "hard"]),
    )

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def a_hard_limit_holds(self) -> None:
        adapters = {r.adapter for r in self.host.scheduler.running} - {None}
        if self.host.options.cluster_mode == "hard":
            assert len(adapters) <= self.host.options.cluster_adapters


class LcfsMachine(ServingMachine):
    options = options("lcfs")


class VtcMachine(ServingMachine):
    options = options("vtc", vtc_adapter_weights=st.just({"one": 2.0, "four": 0.5}))

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def an_adapter_is_served_in_order(self) -> None:
        order: dict[str | None, list[int]] = {}
        for request in self.host.admitted:
            order.setdefault(request.adapter, []).append(int(request.id.split()[1]))
        assert all(numbers == sorted(numbers) for numbers in order.values())

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def who_waits_is_counted(self) -> None:
        waiting = [r for r in self.host.scheduler.waiting if not r.num_preemptions]
        assert self.host.policy._waiting.total() == len(waiting)


class PriorityMachine(ServingMachine):
    options = options("priority", priority_ageing_s=st.sampled_from([1.0, 30.0]))

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def the_least_urgent_is_preempted_first(self) -> None:
        keys = [self.host.policy.seniority(r) for r in self.host.scheduler.running]
        assert keys == sorted(keys)


class AbortMachine(ServingMachine):
    options = options("abort", slo_first_token_s=st.sampled_from([0.6, 3.0, 10.0]))

    def __init__(self) -> None:
        super().__init__()
        self.since: dict[tuple[Request, int], float] = {}  # who waits, and was first seen so

    @precondition(lambda self: hasattr(self, "host"))
    @invariant()
    def only_the_late_are_turned_away(self) -> None:
        slo = self.host.options.slo_first_token_s
        for rejection in self.host.rejected:
            assert rejection.request.num_output == 0
            assert f"{slo:g} s (slo_first_token_s)" in rejection.reason
        waiting = {(r, r.num_preemptions): self.host.now for r in self.host.scheduler.waiting}
        self.since = {which: self.since.get(which, now) for which, now in waiting.items()}
        for (request, _), since in self.since.items():
            if since < self.host.now:  # else it was preempted later in the step than this is asked
                waited = self.host.now - self.host.step_s - request.arrival
                assert request.num_output or waited + self.host.options.slo_margin_s < slo


MACHINES = {
    "fcfs": FcfsMachine,
    "lcfs": LcfsMachine,
    "abort": AbortMachine,
    "cluster": ClusterMachine,
    "vtc": VtcMachine,
    "priority": PriorityMachine,
}


@pytest.mark.parametrize("policy", MACHINES)
def test_histories(policy):
    few = settings(max_examples=60, stateful_step_count=40)
    run_state_machine_as_test(MACHINES[policy], settings=few)


def test_every_policy_has_its_machine():
    assert set(MACHINES) == set(POLICIES)


def first_admitted(host: Host, requests: list[Request], steps: int = 200) -> list[int]:
    """Steps the host until all have begun; their indices in that order."""
    host.step_until(lambda: not host.overtakers, steps)
    return [requests.index(r) for r in host.admitted if r in requests]


class TestFcfs:
    def test_skips_who_finds_no_room(self):
        host = Host(capacity=6, max_overtakes=2)
        host.add(8, max_output=8)
        host.step()
        large, small = host.add(12, max_output=4), host.add(3)
        host.step()
        assert small not in host.overtakers
        assert large in host.overtakers

    def test_but_not_for_ever(self):
        """Small requests never leave room for a large one, unless they are made to wait."""
        host = Host(capacity=6, max_overtakes=3, max_num_seqs=2)
        host.add(7, max_output=4)
        host.step()
        host.add(7, max_output=4)
        host.step()
        large = host.add(20, max_output=4)
        while large in host.overtakers:
            host.add(7, max_output=4)
            host.step()
            assert len(host.admitted) < 10
        assert len(host.admitted) == 2 + 3 + 1

    def test_the_bound_holds_within_a_step(self):
        host = Host(capacity=9, max_overtakes=1, max_num_seqs=6)
        host.add(8, max_output=8)
        host.step()
        large = host.add(30, max_output=4)
        small = [host.add(3) for _ in range(3)]
        host.step()
        assert large in host.overtakers
        assert [request in host.overtakers for request in small] == [False, True, True]
        host.drain()

    def test_looks_no_further_than_the_lookahead(self):
        host = Host(capacity=6, max_overtakes=9, scheduling_lookahead=1)
        host.add(8, max_output=8)
        host.step()
        for _ in range(2):
            host.add(12, max_output=4)
        small = host.add(3)
        host.step()
        assert small in host.overtakers


class TestLcfs:
    def test_the_newest_goes_first(self):
        host = Host(max_num_seqs=1, spare_tokens=12, scheduling_policy="lcfs")
        requests = [host.add(4, max_output=3) for _ in range(4)]
        assert first_admitted(host, requests) == [3, 2, 1, 0]
        host.drain()

    def test_a_stream_that_has_begun_goes_on_before_the_newest(self):
        host = Host(max_num_seqs=1, scheduling_policy="lcfs")
        begun = host.add(4, max_output=9)
        host.step()
        host.step()
        host.scheduler.preempt(begun)
        host.add(4)
        host.step()  # its last token is read
        host.step()
        assert host.scheduler.running == [begun]
        host.drain()


class TestCluster:
    @pytest.mark.parametrize(("mode", "order"), [("soft", [0, 2, 1]), ("hard", [0, 2, 1])])
    def test_the_batchs_adapters_are_preferred(self, mode, order):
        host = Host(
            max_num_seqs=2,
            scheduling_policy="cluster",
            cluster_adapters=1,
            cluster_mode=mode,
            max_overtakes=9,
        )
        requests = [host.add(4, max_output=4, adapter=name) for name in ("one", "two", "one")]
        assert first_admitted(host, requests) == order
        host.drain()

    @pytest.mark.parametrize(("mode", "together"), [("soft", 2), ("hard", 1)])
    def test_only_a_soft_limit_fills_up_with_others(self, mode, together):
        host = Host(scheduling_policy="cluster", cluster_adapters=1, cluster_mode=mode)
        for name in ("one", "two"):
            host.add(4, max_output=4, adapter=name)
        host.step()
        assert len(host.scheduler.running) == together
        host.drain()

    def test_the_base_model_is_in_every_cluster(self):
        host = Host(scheduling_policy="cluster", cluster_adapters=1, cluster_mode="hard")
        for name in ("one", None, "one"):
            host.add(4, max_output=4, adapter=name)
        host.step()
        assert len(host.scheduler.running) == 3
        host.drain()


class TestVtc:
    @pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
    def test_service_is_shared_by_weight(self, weight, share):
        """While both adapters wait, whoever sends more."""
        host = Host(max_num_seqs=2, scheduling_policy="vtc", vtc_adapter_weights={"one": weight})
        for n in range(200):
            host.add(4, max_output=4, adapter="two" if n % 4 else "one")
        while any(r.adapter == "one" for r in host.overtakers):
            host.step()
        served = [request.adapter for request in host.admitted]
        assert served.count("one") == 50
        assert served.count("one") / len(served) == pytest.approx(share, abs=0.03)

    def test_a_pause_earns_no_credit(self):
        host = Host(max_num_seqs=1, scheduling_policy="vtc")
        for _ in range(20):
            host.add(4, max_output=4, adapter="one")
        host.step_until(lambda: len(host.admitted) == 10)
        late = [host.add(4, max_output=4, adapter="two") for _ in range(10)]
        host.step_until(lambda: not host.overtakers)
        ranks = [index for index, request in enumerate(host.admitted) if request in late]
        assert ranks[0] <= 12
        assert ranks[4] >= 10 + 7  # not all at once


class TestPriority:
    def test_lower_goes_first_and_age_counts(self):
        host = Host(max_num_seqs=1, scheduling_policy="priority", priority_ageing_s=10)
        host.add(4, max_output=2)
        host.step()
        old = host.add(4, max_output=2, priority=1)
        host.now += 11
        urgent = host.add(4, max_output=2, priority=-1)
        normal = host.add(4, max_output=2, priority=0)
        assert first_admitted(host, [old, urgent, normal]) == [1, 0, 2]

    def test_the_least_urgent_is_preempted(self):
        host = Host(capacity=9, spare_tokens=28, scheduling_policy="priority")
        requests = [host.add(8, max_output=8, priority=p) for p in (2, 0, 1)]
        host.step_until(lambda: host.scheduler.num_preemptions > 0)
        assert [r.num_preemptions for r in requests] == [1, 0, 0]
        host.drain()


class TestEarlyAbort:
    def test_who_would_be_late_is_told_so(self):
        host = Host(max_num_seqs=1, scheduling_policy="abort")
        host.add(4, max_output=20)
        late = host.add(4)
        host.step_until(lambda: host.rejected)
        [rejection] = host.rejected
        assert rejection.request is late
        assert rejection.reason.startswith("overloaded: after 6.0 s in the queue")
        host.drain()

    def test_the_predicted_time_to_the_first_token_counts(self):
        """A prompt of three steps, of a second each, has to begin three seconds earlier."""
        model = CostModel(warm_up=1)
        model.observe(StepLoad(16, 100, 0, 0), 1.0)
        policy = EarlyAbort(SchedulingOptions(scheduling_policy="abort"), model, step_tokens=16)
        queue = WaitingQueue()
        for length in (16, 48):
            tokens = [0] * length
            queue.add(Request(id=str(length), prompt=tokens, params=SamplingParams()))
        turned_away = [
            [rejection.request.id for rejection in policy.hopeless(queue, now)]
            for now in (2.4, 2.6, 4.4, 4.6)
        ]
        assert turned_away == [[], ["48"], ["48"], ["16", "48"]]

    def test_who_was_preempted_before_a_token_is_told_so_too(self):
        host = Host(max_num_seqs=1, spare_tokens=1, scheduling_policy="abort")
        request, other = host.add(4), host.add(4)
        host.step()
        assert request.num_output == 0  # half of its prompt is computed
        host.scheduler.preempt(request)
        host.now += 100
        host.step()
        assert {rejection.request for rejection in host.rejected} == {request, other}
        assert host.live == {}
        host.drain()

    def test_a_stream_that_has_begun_is_never_turned_away(self):
        host = Host(max_num_seqs=1, scheduling_policy="abort")
        request = host.add(4, max_output=9)
        host.step_until(lambda: len(request.output) == 2)
        host.scheduler.preempt(request)
        host.now += 100
        host.drain()
        assert len(request.output) == 9
        assert not host.rejected

    def test_newest_first_when_more_arrive_than_are_admitted(self):
        host = Host(max_num_seqs=1, scheduling_policy="abort", slo_first_token_s=100.0)
        requests = []
        for _ in range(6):
            requests.append(host.add(4, max_output=4))
            host.step()
        assert host.policy.overloaded
        host.step_until(lambda: len(host.admitted) >= 3)
        assert requests.index(host.admitted[2]) > 2
        host.drain()

    def test_rates_are_smoothed_over_windows(self):
        rate = SmoothedRate(window=2.0, smoothing=0.7)
        for now in (0.0, 0.5, 1.0, 1.9):
            rate.count(now)
        rate.update(2.0)
        assert rate.value == pytest.approx(0.7 * 4 / 2)
        rate.update(6.5)  # two more windows, empty
        assert rate.value == pytest.approx(0.7 * 2 * 0.3**2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduling_policy", "best"),
        ("max_overtakes", -1),
        ("slo_margin_s", 6.0),
        ("slo_rate_smoothing", 0.0),
        ("cluster_adapters", 0),
        ("cluster_mode", "medium"),
        ("vtc_adapter_weights", {"a": 0.0}),
        ("priority_ageing_s", 0.0),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        SchedulingOptions(**{name: value})
