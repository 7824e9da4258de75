# SPDX-License-Identifier: Apache-2.0
"""Threads that read files. One that a disk or a network holds for ever does not hold the others."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from slora_jax.adapters.errors import AdapterUnavailable

_SLOW_S = 1.0  # after so long, a read no longer counts among those that go on at a time
_GRACE_S = 1.0  # a read may notice by itself that its time is over, and say more about it
_TICK_S = 0.25  # between two looks at the reads under way
_IDLE_S = 10.0  # in which a thread waits for the next read
_MOST_READS = 64  # at a time, slow ones included


@dataclass(slots=True, eq=False)
class _Read:
    call: Callable[[], Any]
    future: Future = field(default_factory=Future)
    began: float = 0.0
    slow: bool = False  # its thread is replaced, and ends with it
    given_up: bool = False


class Reads(Executor):
    """Runs reads, several at a time.

    A thread cannot be stopped. So a read that takes long is left to itself: another thread takes
    its thread's place, and after a while its future fails. There is a limit of such reads; what
    comes then is refused until one of them has ended.

    Args:
        name: of the threads.
        threads: reads at a time, those left to themselves not counted.
        time_limit_s: of each read, from when it begins.
    """

    def __init__(self, name: str, threads: int, time_limit_s: float) -> None:
        self._name = name
        self._threads = threads
        self._time_limit_s = time_limit_s
        self._waiting: deque[_Read] = deque()
        self._reading: set[_Read] = set()
        self._working = 0  # threads, those of slow reads not counted
        self._idle = 0  # among them
        self._watched = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has a thread call a function.

        Returns:
            Fails with AdapterUnavailable if that takes longer than the limit, or too many do.
        """
        read = _Read(lambda: fn(*args, **kwargs))
        with self._lock:
            full = len(self._reading) >= _MOST_READS
            if not full:
                self._waiting.append(read)
                self._staff()
                self._watch()
        if full:
            read.future.set_exception(
                AdapterUnavailable(
                    f"{_MOST_READS} reads of adapters' files have not ended: their disk or network "
                    "may hang. Try again later"
                )
            )
        return read.future

    def _staff(self) -> None:
        """Wakes a thread for what waits, or begins another one."""
        left_alone = sum(read.slow for read in self._reading)
        if self._idle >= len(self._waiting):
            self._work.notify()
        elif self._working < min(self._threads, _MOST_READS - left_alone):
            self._working += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while (read := self._next()) is not None:
            result, error = None, None
            try:
                result = read.call()
            except BaseException as problem:
                error = problem
            with self._lock:
                self._reading.discard(read)
                given_up, slow = read.given_up, read.slow
                read.given_up = True  # from here on it is this thread's
            if not given_up and error is not None:
                read.future.set_exception(error)
            elif not given_up:
                read.future.set_result(result)
            if slow:
                return
            del read, result, error  # an adapter may be large

    def _next(self) -> _Read | None:
        """The next read, begun; None if there is none for a while: the thread is to end."""
        with self._work:
            while True:
                while self._waiting:
                    read = self._waiting.popleft()
                    if read.future.set_running_or_notify_cancel():
                        read.began = time.monotonic()
                        self._reading.add(read)
                        return read
                self._idle += 1
                called = self._work.wait(_IDLE_S)
                self._idle -= 1
                if not called and not self._waiting:
                    self._working -= 1
                    return None

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            threading.Thread(target=self._look, name=f"{self._name} watch", daemon=True).start()

    def _look(self) -> None:
        """Looks for slow reads, as long as there are any reads."""
        watched = True
        while watched:
            time.sleep(_TICK_S)
            with self._lock:
                late = self._find_slow(time.monotonic())
                for _ in self._waiting:
                    self._staff()
                watched = self._watched = bool(self._reading or self._waiting)
            for read in late:
                read.future.set_exception(
                    AdapterUnavailable(
                        f"an adapter's files were not read within {self._time_limit_s:g} s: their "
                        "disk or network may hang. Try again later"
                    )
                )

    def _find_slow(self, now: float) -> list[_Read]:
        """Replaces the threads of slow reads; returns the reads to be given up."""
        late = []
        for read in self._reading:
            if not read.slow and now - read.began > _SLOW_S:
                read.slow = True
                self._working -= 1
            if not read.given_up and now - read.began > self._time_limit_s + _GRACE_S:
                read.given_up = True
                late.append(read)
        return late
