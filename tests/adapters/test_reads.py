# SPDX-License-Identifier: Apache-2.0
"""Reads that hang hold only those who wait for them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from slora_jax.adapters import reads as module
from slora_jax.adapters.errors import AdapterUnavailable
from slora_jax.adapters.reads import Reads
from tests.adapters.world import AdapterHost


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What reads hang on, until the test's end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_SLOW_S", 0.1), ("_TICK_S", 0.02), ("_GRACE_S", 0.0)):
        monkeypatch.setattr(module, name, seconds)


def test_results_and_errors():
    reads = Reads("test", 2, 9)
    assert [reads.submit(pow, 2, n).result(9) for n in range(50)] == [2**n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        reads.submit(lambda: 1 / 0).result(9)
    assert reads.submit(pow, 2, exp=3).result(9) == 8


def test_as_many_at_a_time_as_there_are_threads():
    reads, lock = Reads("test", 3, 9), threading.Lock()
    now, most = 0, 0

    def read() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    for one in [reads.submit(read) for _ in range(30)]:
        one.result(9)
    assert most == 3


def test_those_that_hang_hold_no_others(fast, hang):
    reads = Reads("test", 2, 9)
    stuck = [reads.submit(hang.wait) for _ in range(10)]
    assert reads.submit(pow, 2, 3).result(9) == 8
    assert not any(one.done() for one in stuck)
    hang.set()
    assert all(one.result(9) for one in stuck)


def test_those_that_hang_are_given_up(fast, hang):
    reads = Reads("test", 2, 0.3)
    stuck = reads.submit(hang.wait)
    with pytest.raises(AdapterUnavailable, match=r"not read within 0\.3 s"):
        stuck.result(9)
    hang.set()  # its result comes too late, and harms nobody
    assert reads.submit(pow, 2, 3).result(9) == 8


def test_loads_that_hang_hold_no_others(fast, hang):
    """Neither those of other adapters, nor those of a whole directory, nor the engine's lock."""
    host = AdapterHost(12, 2, 2, 8, 2, reads=Reads("loads", 2, 1.0))
    for place in ("hangs", "hangs too", "fine", "also fine"):
        host.disk.write(place, place, 1)
    read = host.disk.read

    def slow(path, name=None):
        if "hangs" in str(path):
            hang.wait()
        return read(path)

    host.manager._read = slow
    held = [threading.Thread(target=load_refused, args=(host, "hangs"), daemon=True)]
    held += [threading.Thread(target=load_refused, args=(host, "hangs too"), daemon=True)]
    for thread in held:
        thread.start()
    host.manager.load("fine", "fine")
    with pytest.raises(AdapterUnavailable, match=r"hangs.*refused.*not read within 1 s"):
        host.manager.load_all({name: name for name in ("hangs", "also fine")})
    assert [*host.manager.store] == ["fine", "also fine"]
    for thread in held:
        thread.join(9)
        assert not thread.is_alive()


def load_refused(host: AdapterHost, place: str) -> None:
    with pytest.raises(AdapterUnavailable):
        host.manager.load(place, place)


def test_too_many_that_hang(fast, hang, monkeypatch):
    monkeypatch.setattr(module, "_MOST_READS", 5)
    reads = Reads("test", 2, 9)
    stuck = [reads.submit(hang.wait) for _ in range(5)]
    until = time.monotonic() + 9
    while len(reads._reading) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(AdapterUnavailable, match="5 reads"):
        reads.submit(pow, 2, 3).result(9)
    hang.set()
    assert all(one.result(9) for one in stuck)
    assert reads.submit(pow, 2, 3).result(9) == 8


def test_those_that_wait_do_not_make_more_threads_than_may_hang(fast, hang, monkeypatch):
    monkeypatch.setattr(module, "_MOST_READS", 5)
    reads = Reads("test", 2, 9)
    stuck = [reads.submit(hang.wait) for _ in range(9)]
    until, most = time.monotonic() + 1, 0
    while time.monotonic() < until:
        most = max(most, len(reads._reading))
        time.sleep(0.01)
    assert most == 5
    hang.set()
    assert all(one.result(9) for one in stuck)


def test_those_that_fail_do_not_count_as_hanging(monkeypatch):
    monkeypatch.setattr(module, "_MOST_READS", 5)
    reads = Reads("test", 2, 9)
    for _ in range(9):
        with pytest.raises(ZeroDivisionError):
            reads.submit(lambda: 1 / 0).result(9)
    assert reads.submit(pow, 2, 3).result(9) == 8


def test_one_that_has_not_begun_can_be_cancelled(hang):
    reads = Reads("test", 1, 9)
    stuck, called = reads.submit(hang.wait), []
    waiting = reads.submit(called.append, 1)
    assert waiting.cancel()
    hang.set()
    assert stuck.result(9)
    assert reads.submit(pow, 2, 3).result(9) == 8
    assert not called
    with pytest.raises(CancelledError):
        waiting.result(9)


def test_threads_end_when_there_is_nothing_to_read(fast, monkeypatch):
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    reads = Reads("of this test", 3, 9)
    for one in [reads.submit(time.sleep, 0.01) for _ in range(9)]:
        one.result(9)

    def left() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name.startswith("of this test")]

    until = time.monotonic() + 9
    while left() and time.monotonic() < until:
        time.sleep(0.02)
    assert not left()
    assert reads.submit(pow, 2, 3).result(9) == 8, "and begin again"
