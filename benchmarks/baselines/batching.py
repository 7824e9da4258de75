# SPDX-License-Identifier: Apache-2.0
"""Serving with a library that runs one adapter at a time: as S-LoRA's PEFT baseline does.

Requests wait in a queue an adapter. The longest queue is next: as many of it as fit run together to
their last token, the longest output's; then comes the next batch. S-LoRA's baseline stays with an
adapter until thirty others wait; taking the longest queue makes the batches larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.replay import Given
from slora_jax.simulator.workloads import Arrival


class Decoder(Protocol):
    """A model that runs a batch of one adapter."""

    def start(self, adapter: int | None, numbers: Sequence[int]) -> None:
        """Computes the prompts of the trace's requests of these numbers, and a token of each."""
        ...

    def step(self) -> None:
        """Computes the next token of each."""
        ...


@dataclass(slots=True)
class _Waiting:
    number: int
    output: int
    since: float


class OneAdapterAtATime:
    """A `Serving` over a decoder.

    Args:
        decoder: the model.
        most: requests that fit in a batch.
        clock: seconds.
    """

    def __init__(self, decoder: Decoder, most: int, clock) -> None:
        self._decoder = decoder
        self._most = most
        self._clock = clock
        self._queues: dict[int | None, list[_Waiting]] = {}
        self._batch: list[_Waiting] = []
        self._tokens = 0  # that each of the batch has
        self.batches: list[int] = []  # their sizes

    @property
    def is_busy(self) -> bool:
        return bool(self._batch or self._queues)

    def add(self, number: int, one: Arrival) -> str:
        waiting = _Waiting(number, one.output, self._clock())
        self._queues.setdefault(one.adapter, []).append(waiting)
        return str(number)

    def step(self) -> list[Given]:
        now = self._clock()
        if self._batch:
            self._decoder.step()
        else:
            adapter = max(self._queues, key=lambda one: len(self._queues[one]))
            queue = self._queues.pop(adapter)
            self._batch, rest = queue[: self._most], queue[self._most :]
            if rest:
                self._queues[adapter] = rest
            self._decoder.start(adapter, [one.number for one in self._batch])
            self.batches.append(len(self._batch))
        self._tokens += 1
        given = [
            Given(str(one.number), 1, now - one.since)
            for one in self._batch
            if self._tokens <= one.output
        ]
        if all(self._tokens >= one.output for one in self._batch):
            self._batch, self._tokens = [], 0
        return given
