# SPDX-License-Identifier: Apache-2.0
"""The baselines' own part: which requests run together, and when each has its tokens."""

from benchmarks.baselines.batching import OneAdapterAtATime
from benchmarks.replay import replay
from slora_jax.simulator.workloads import Arrival


class Log:
    """A decoder that only remembers what it was asked to do."""

    def __init__(self) -> None:
        self.batches: list[tuple[int | None, list[int], int]] = []  # adapter, requests, steps

    def start(self, adapter, numbers) -> None:
        self.batches.append((adapter, list(numbers), 1))

    def step(self) -> None:
        adapter, numbers, steps = self.batches.pop()
        self.batches.append((adapter, numbers, steps + 1))


def test_the_longest_queue_is_next_as_many_as_fit_to_the_longest_output():
    log = Log()
    arrivals = [Arrival(0.0, adapter, 8, 1 + number) for number, adapter in enumerate([1, 0, 0, 0])]
    served, _ = replay(OneAdapterAtATime(log, 2, lambda: 0.0), arrivals, 60.0, drain=False)
    assert log.batches == [(0, [1, 2], 3), (1, [0], 1), (0, [3], 4)]
    assert all(one.finished for one in served)
    assert [len(one.tokens) for one in served] == [1, 2, 3, 4]


def test_time_in_the_queue_is_counted():
    now = iter([1.0, 2.0, 5.0, 9.0])
    serving = OneAdapterAtATime(Log(), 1, lambda: next(now))
    serving.add(0, Arrival(0.0, None, 8, 1))
    serving.add(1, Arrival(0.0, None, 8, 1))
    waits = [[(one.request_id, one.queue_seconds) for one in serving.step()] for _ in range(2)]
    assert waits == [[("0", 4.0)], [("1", 7.0)]]
    assert not serving.is_busy


def test_a_run_ends_on_time_whatever_is_left():
    arrivals = [Arrival(0.0, 0, 8, 10**9), Arrival(100.0, 0, 8, 1)]
    served, end = replay(OneAdapterAtATime(Log(), 4, lambda: 0.0), arrivals, 0.05, drain=False)
    assert 0.05 <= end < 5
    [one] = served
    assert one.tokens
    assert not one.finished
