# SPDX-License-Identifier: Apache-2.0
"""More adapters than fit, one of them hot: how long its neighbours wait at worst.

The hot adapter always has eight requests waiting. Every few steps a request comes for an adapter of
the tail, each time another one: sixty of them, while the pool has room for three at once.
"""

import pytest

from slora_jax.core import Request
from tests.adapters.world import AdapterHost
from tests.scheduling import model
from tests.scheduling.model import Host

TAIL = 60
SIZES = {"capacity": 18, "max_num_seqs": 6, "adapter_slots": 3}
OVERTAKES = 8


@pytest.fixture
def tail(monkeypatch) -> list[str]:
    """Adapters of two pages each."""
    names = [f"tail-{n}" for n in range(TAIL)]
    pages = {**model.ADAPTER_PAGES, **dict.fromkeys([*names, "hot"], 2)}
    monkeypatch.setattr(model, "ADAPTER_PAGES", pages)
    return names


def worst_waits(
    tail: list[str], *, priority: int = 0, every: int = 4, host: Host | None = None, **options
) -> tuple[int, int, float]:
    """How often anybody was overtaken, the tail's longest wait in steps, the hot one's share.

    A step takes a second. Of all admissions, until the last of the tail; the wait is for admission.
    """
    host = host or Host(**SIZES, max_overtakes=OVERTAKES, **options)
    names, arrived, waits, overtaken = iter(tail), dict[Request, int](), list[int](), 0
    for step in range(4000):
        if step % every == 0 and (name := next(names, None)):
            request = host.add(6, max_output=6, adapter=name, priority=priority)
            arrived[request] = step
        while sum(r.adapter == "hot" for r in host.scheduler.waiting) < 8:
            host.add(6, max_output=6, adapter="hot")
        before = len(host.admitted)
        host.step()
        overtaken = max(overtaken, *host.overtakers.values())
        waits += [step - arrived[r] for r in host.admitted[before:] if r in arrived]
        if len(waits) == len(tail):
            hot = sum(request.adapter == "hot" for request in host.admitted)
            return overtaken, max(waits), hot / len(host.admitted)
    pytest.fail(f"{len(tail) - len(waits)} requests of the tail starve")


@pytest.mark.parametrize(
    ("every", "steps", "options"),
    [
        (4, 40, {"scheduling_policy": "fcfs"}),
        (4, 50, {"scheduling_policy": "cluster", "cluster_adapters": 1}),
        (4, 50, {"scheduling_policy": "cluster", "cluster_adapters": 2}),
        # A hard limit empties part of the batch for each adapter of the tail: it serves fewer.
        (8, 24, {"scheduling_policy": "cluster", "cluster_adapters": 2, "cluster_mode": "hard"}),
        (24, 40, {"scheduling_policy": "cluster", "cluster_adapters": 1, "cluster_mode": "hard"}),
    ],
)
def test_overtaking_is_bounded(tail, every, steps, options):
    """Whoever waits sees at most `max_overtakes` later requests admitted before it."""
    overtaken, waited, hot = worst_waits(tail, every=every, **options)
    assert 0 < overtaken <= OVERTAKES
    assert waited <= steps
    assert hot > 0.2


def test_fairness_serves_the_tail_at_once(tail):
    """Its requests are the first of adapters that had nothing, so hardly any hot one is ahead."""
    _, waited, hot = worst_waits(tail, scheduling_policy="vtc")
    assert waited <= 20
    assert hot > 0.2


@pytest.mark.parametrize("ageing", [5.0, 40.0])
def test_low_priority_waits_no_longer_than_its_age_is_worth(tail, ageing):
    """Two levels below the hot one: it gives way to what arrives within two ageing times."""
    _, first_come, _ = worst_waits(tail, scheduling_policy="priority")
    _, waited, _ = worst_waits(
        tail, priority=2, scheduling_policy="priority", priority_ageing_s=ageing
    )
    assert waited > first_come
    assert waited <= 2 * ageing + first_come + 4


class SlowHost(AdapterHost):
    """Reads an adapter a step, and needs two steps for a copy; holds four adapters in memory."""

    def __init__(self, names: list[str], **options):
        super().__init__(
            SIZES["capacity"],
            4,
            SIZES["max_num_seqs"],
            12,
            SIZES["adapter_slots"],
            staging_pages=4,
            max_cpu_loras=4,
            max_bytes=1000,
            max_overtakes=OVERTAKES,
            **options,
        )
        for name in names:
            self.manager.load(name, self.disk.write(f"/{name}", name, 2))

    def add(self, prompt, max_output=1, adapter=None, stops_after=None, priority=0):
        return self.ask(adapter, prompt, max_output)

    def step(self):
        arrived = tuple(self.copies)
        plan = super().step()
        for copy in arrived:
            copy.done = True
        self.copies = [copy for copy in self.copies if not copy.done]
        if self.threads.waiting:
            self.threads.run_one()
        return plan


@pytest.mark.parametrize("policy", ["fcfs", "vtc"])
def test_slow_loads_starve_nobody(tail, policy):
    """The tail's adapters come from the disk, by a read and a copy: no request is counted out.

    Requests without an adapter were not counted as overtaken once: they waited 181 steps, not 32.
    """
    _, waited, _ = worst_waits(tail, scheduling_policy=policy)
    slow = SlowHost([*tail, "hot"], scheduling_policy=policy)
    _, slowly, hot = worst_waits(tail, host=slow)
    assert slowly <= waited + 10
    assert hot > 0.2


def test_last_come_first_served_does_starve(tail):
    """So that the bounds above mean something."""
    with pytest.raises(pytest.fail.Exception, match="starve"):
        worst_waits(tail, scheduling_policy="lcfs")
