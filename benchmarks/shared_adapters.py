# SPDX-License-Identifier: Apache-2.0
"""Thousands of adapters on a host with memory for few: many names share one copy on the host.

Loads copy the same bytes from there again and again, but in the pool each adapter has pages of its
own: the device reads and holds as much as if all weights differed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.synthetic import MODULES, write_adapters
from slora_jax import Engine
from slora_jax.adapters.reader import HostAdapter


@dataclass(frozen=True, slots=True, eq=False)
class SharingAdapter(HostAdapter):
    """An adapter whose host memory is another one's."""

    @property
    def nbytes(self) -> int:
        return 0

    @classmethod
    def of(cls, adapter: HostAdapter, id: str) -> "SharingAdapter":
        values = {field.name: getattr(adapter, field.name) for field in fields(HostAdapter)}
        return cls(**{**values, "id": id})


def name_of(number: int) -> str:
    return f"adapter-{number}"


def load_shared(
    engine: Engine,
    directory: Path,
    *,
    count: int,
    ranks: Sequence[int],
    modules: tuple[str, ...] = MODULES,
) -> int:
    """Loads `count` adapters; number i has rank `ranks[i % len(ranks)]`.

    Args:
        engine: for the adapters.
        directory: a new one, for the few that are written.
        count: how many.
        ranks: theirs.
        modules: of the layers, that all adapt.

    Returns:
        How many copies the host holds.
    """
    originals = []
    for rank in dict.fromkeys(ranks):
        shape = {"count": 1, "rank": rank, "modules": modules, "prefix": f"rank-{rank}"}
        [(name, path)] = write_adapters(directory / str(rank), engine.config, **shape).items()
        engine.load_adapter(name, path)
        original = engine.adapters.host.get(engine.adapters.store[name].version.id)
        assert original is not None, "host memory has no room for a single adapter"
        originals.append((rank, original))
    by_rank = dict(originals)
    for number in range(count):
        original = by_rank[ranks[number % len(ranks)]]
        name = name_of(number)
        engine.adapters.add(name, SharingAdapter.of(original, f"{original.id}-{number}"))
    return len(originals)
