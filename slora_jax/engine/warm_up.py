# SPDX-License-Identifier: Apache-2.0
"""Compiles a server's programs before the first request, by serving requests of its own."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from slora_jax.core import SamplingParams

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

type _Batch = tuple[list[int], SamplingParams, str | None]  # lengths of prompts, how, for whom


def warm_up(engine: "Engine", *, progress: bool = False) -> None:
    """Runs steps of all sizes, for the base model, and for adapters of each kind that is loaded.

    Greedy steps and sampled ones; penalties and log-probabilities are compiled when they are asked
    for, and so is all that an adapter with new modules changes.

    Args:
        engine: idle, its adapters loaded.
        progress: draw a bar on stderr.
    """
    batches = list(_batches(engine))
    console = Console(stderr=True)
    for lengths, params, adapter in track(
        batches, "warming up", disable=not progress, console=console, transient=True
    ):
        engine.generate([[0] * length for length in lengths], params, adapters=adapter)
    cache = engine.adapters.cache  # its counts are of others' requests
    cache.num_hits = cache.num_misses = cache.num_evictions = 0
    engine.adapters.loader.take_load_seconds()


def _batches(engine: "Engine") -> Iterator[_Batch]:
    greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    sampled = SamplingParams(temperature=1, max_tokens=1, ignore_eos=True)
    buckets, longest = engine.runner.buckets, engine.options.max_model_len
    assert longest is not None
    most = engine.options.max_num_seqs
    for adapter in _one_of_each_kind(engine):
        room = min(longest - 1, _room(engine, adapter))
        if room < 1:
            continue  # others are pinned: it will be compiled if it is ever asked for
        for rows in buckets.decode_sizes:
            yield [1] * rows, greedy, adapter
        for tokens in buckets.mixed_sizes:
            yield _prompts(tokens, room, most), greedy, adapter
        if adapter is None:
            for rows in buckets.decode_sizes:
                yield [1] * rows, sampled, None


def _room(engine: "Engine", adapter: str | None) -> int:
    """Tokens of the longest prompt that fits in the pool beside its adapter and what is pinned."""
    adapters = engine.adapters
    adapter_id = None if adapter is None else adapters.store[adapter].version.id
    pages = adapters.room_for(adapter_id)
    if adapter_id is not None:
        pages -= adapters.pages_of(adapter_id)
    return pages * engine.options.page_size - 1


def _prompts(tokens: int, longest: int, most: int) -> list[int]:
    """Lengths of prompts of so many tokens in all, or of as many as can be in one step."""
    lengths = []
    while tokens and len(lengths) < most:
        lengths.append(min(tokens, longest))
        tokens -= lengths[-1]
    return lengths


def _one_of_each_kind(engine: "Engine") -> Sequence[str | None]:
    """None, an adapter of layers only, and one of the embedding or the head, if there are such."""
    store = engine.adapters.store
    found = {store[name].version.has_outer: name for name in store}
    return [None, *found.values()]
