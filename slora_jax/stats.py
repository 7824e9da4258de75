# SPDX-License-Identifier: Apache-2.0
"""What an engine says of itself, for metrics and dashboards. No JAX."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """An adapter in the pool.

    Attributes:
        names: what requests call it; its id if it has lost its names.
        pages: that it takes.
        rank: the largest of any module.
        users: requests of the batch that use it.
        pinned: whether it stays although nobody uses it.
    """

    names: tuple[str, ...]
    pages: int
    rank: int
    users: int
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine between two steps.

    Attributes:
        running, waiting: requests in the batch, and in the queue.
        running_adapters, waiting_adapters: names that they asked for.
        pages: of the pool, the reserved one left out.
        kv_pages, free_pages: those with keys and values, and those with nothing.
        residents: adapters in the pool, least recently used first.
        loaded: names that requests may ask for.
        in_host_memory: adapters.
        hits, misses, evictions: how often a request that was admitted found its adapter in the
            pool or not, and how many adapters left it, since the start.
        preemptions, steps: since the start.
        load_seconds: since the last call, how long each adapter that was wanted and not in the pool
            took to be ready on the device.
    """

    running: int
    waiting: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    pages: int
    kv_pages: int
    free_pages: int
    residents: tuple[AdapterStats, ...]
    loaded: int
    in_host_memory: int
    hits: int
    misses: int
    evictions: int
    preemptions: int
    steps: int
    load_seconds: tuple[float, ...]
