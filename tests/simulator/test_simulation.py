# SPDX-License-Identifier: Apache-2.0
"""The virtual clock is right, and policies do in it what S-LoRA found that they do."""

import time
from dataclasses import replace
from statistics import mean

import pytest

from slora_jax.scheduling.cost_model import StepCost
from slora_jax.scheduling.options import POLICIES, SchedulingOptions
from slora_jax.simulator.device import Server
from slora_jax.simulator.metrics import Metrics, jain, measure
from slora_jax.simulator.presets import DEVICES, PRESETS, fitted
from slora_jax.simulator.simulation import Outcome, Served, simulate
from slora_jax.simulator.workloads import Arrival

SLOW = Server(
    cost=StepCost(step_s=1.0, token_s=0.1, install_rank_s=0.25),
    pool_tokens=1600,
    tokens_per_rank=4,
    max_num_seqs=2,
    max_num_batched_tokens=16,
)
FCFS = SchedulingOptions()


def run(preset: str, policy: str, *, seed: int = 0, **workload) -> Metrics:
    """A preset under a policy, its workload changed a little."""
    setting = PRESETS[preset]
    arrivals = replace(setting.workload, **workload).arrivals(seed)
    options = SchedulingOptions(scheduling_policy=policy)
    return measure(simulate(arrivals, setting.ranks, setting.server(), options), 6.0)


def test_one_request_by_hand():
    """20 prompt tokens in two chunks, then a token a step; the adapter is loaded with the first."""
    outcome = simulate([Arrival(3.0, 0, 20, 3)], [8], SLOW, FCFS)
    [served] = outcome.served
    first = 3.0 + (1 + 1.6 + 8 * 0.25) + (1 + 0.4)
    assert served.first_token == pytest.approx(first)
    assert served.finished == pytest.approx(first + 2 * 1.1)
    assert (outcome.steps, outcome.tokens, outcome.installs) == (4, 22, 1)
    assert outcome.seconds == served.finished


def test_an_adapter_that_stays_is_loaded_once():
    trace = [Arrival(0.0, 0, 4, 2), Arrival(50.0, 0, 4, 2), Arrival(100.0, None, 4, 2)]
    outcome = simulate(trace, [8], SLOW, FCFS)
    assert outcome.installs == 1
    latencies = [one.latency for one in outcome.served]
    assert latencies == pytest.approx([1.4 + 2.0, 1.4, 1.4])


def test_the_scheduler_notices_an_arrival_when_a_step_begins():
    """The step after next is the first that can have it: the next one was planned before."""
    trace = [Arrival(0.0, None, 4, 9), Arrival(0.1, None, 4, 1)]
    outcome = simulate(trace, [8], SLOW, FCFS)
    # 4 tokens, then 1, and 1 + 4 with the second prompt.
    assert outcome.served[1].first_token == pytest.approx(1.4 + 1.1 + 1.5)


def test_who_cannot_be_served_at_all_is_refused():
    with pytest.raises(ValueError, match="the pool has 100"):
        simulate([Arrival(0.0, 0, 1600, 1)], [8], SLOW, FCFS)
    with pytest.raises(ValueError, match="order of time"):
        simulate([Arrival(1.0, 0, 8, 1), Arrival(0.0, 0, 8, 1)], [8], SLOW, FCFS)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_request_is_lost(policy):
    """Nor served twice, whatever runs short: each is finished or turned away."""
    workload = replace(PRESETS["a10g-s2"].workload, rate=4, seconds=40, cv=4)
    options = SchedulingOptions(scheduling_policy=policy)
    server = PRESETS["a10g-s2"].server()
    outcome = simulate(workload.arrivals(3), (64, 32, 16, 8), server, options)
    assert outcome.steps > 0
    for one in outcome.served:
        assert (one.finished is None) != (one.rejected is None)
        if one.rejected is None:
            assert one.arrival.time < one.first_token <= one.finished <= outcome.seconds
    assert (policy == "abort") == any(one.rejected is not None for one in outcome.served)


@pytest.mark.parametrize(
    ("preset", "least"),
    [("a10g-s2", 0.78), ("a100-80-s4", 0.65)],
)
@pytest.mark.long
def test_the_papers_order_of_policies(preset, least):
    """Its attainments: .27 < .79 < .86 on the A10G, .10 < .70 < .72 on the A100; not fitted.

    Means of three traces: they differ by more than the policies' last places do.
    """
    fcfs, lcfs, abort = (
        mean(run(preset, policy, seed=seed).attainment for seed in range(3))
        for policy in ("fcfs", "lcfs", "abort")
    )
    assert fcfs < lcfs - 0.3
    assert lcfs <= abort
    assert abort >= least


def test_early_abort_spares_those_it_serves():
    metrics = run("a10g-s2", "abort")
    assert metrics.rejected > 0
    assert metrics.worst_wait_s < 6.2
    assert metrics.attainment == pytest.approx(1 - metrics.rejected / metrics.requests, abs=0.01)


def test_without_overload_policies_are_alike():
    for policy in POLICIES:
        assert run("a10g-s2", policy, rate=1, seconds=60).attainment == 1.0


def test_fairness_pays_where_one_adapter_takes_all():
    skewed = {"zipf": 1.2, "seconds": 200}
    fcfs, vtc = (run("a10g-s2", policy, **skewed) for policy in ("fcfs", "vtc"))
    assert vtc.fairness > fcfs.fairness + 0.2


def test_clustering_helps_under_load():
    load = {"adapters": 32, "rate": 2, "seconds": 120}
    setting = PRESETS["a100-40-s4"]
    arrivals = replace(setting.workload, **load).arrivals(0)
    found = {}
    for d in (2, 32):
        options = SchedulingOptions(scheduling_policy="cluster", cluster_adapters=d)
        found[d] = measure(simulate(arrivals, setting.ranks, setting.server(), options), 6.0)
    assert found[2].throughput > found[32].throughput
    assert found[2].attainment > found[32].attainment


def test_the_scheduler_learns_what_the_device_costs():
    """The cost model that early abort asks has seen steps only, not the device's constants.

    All steps have adapters here, so that only the sum of the fixed parts is to be known.
    """
    setting = PRESETS["a10g-s2"]
    server = setting.server()
    outcome = simulate(setting.workload.arrivals(0)[:200], setting.ranks, server, FCFS)
    learnt, true = outcome.cost_model.cost, server.cost
    assert learnt.step_s + learnt.lora_s == pytest.approx(true.step_s + true.lora_s, rel=0.02)
    for name in ("token_s", "context_s", "rank_s", "install_rank_s"):
        assert getattr(learnt, name) == pytest.approx(getattr(true, name), rel=0.02), name


def test_it_is_fast():
    """A thousand requests a second at least on an idle core; this machine may be busy."""
    arrivals = PRESETS["a100-80-s4"].workload.arrivals(0)[:600]
    start = time.process_time()
    simulate(arrivals, (64, 32, 16), PRESETS["a100-80-s4"].server(), FCFS)
    assert len(arrivals) / (time.process_time() - start) > 300


def test_every_device_was_fitted():
    assert set(fitted()) == set(DEVICES)
    assert {preset.device for preset in PRESETS.values()} == set(DEVICES)


def test_metrics_by_hand():
    def served(adapter: int, wait: float | None) -> Served:
        one = Served(Arrival(1.0, adapter, 8, 10))
        if wait is None:
            one.rejected = 9.0
        else:
            one.first_token, one.finished = 1.0 + wait, 2.0 + wait
        return one

    outcome = Outcome([served(0, 3.0), served(0, 7.0), served(1, None), served(1, 0.0)], 20.0)
    metrics = measure(outcome, 6.0)
    assert (metrics.requests, metrics.rejected) == (4, 1)
    assert metrics.throughput == 3 / 20
    assert metrics.tokens_per_s == 30 / 20
    assert metrics.first_token_s == pytest.approx(10 / 3)
    assert (metrics.first_token_p50_s, metrics.worst_wait_s) == (3.0, 7.0)
    assert metrics.latency_s == pytest.approx(10 / 3 + 1)
    assert metrics.attainment == 2 / 4
    assert metrics.satisfaction == pytest.approx((0.75 + 0 + 0 + 1) / 4)
    assert (metrics.fairness, metrics.worst_adapter) == (1.0, 0.5)


def test_jain():
    assert jain([1, 1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 1
