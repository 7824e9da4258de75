# SPDX-License-Identifier: Apache-2.0
"""The pool with fixed shares: neither side takes the other's, and the rest of the engine agrees."""

import numpy as np
import pytest

from benchmarks.fixed_split import FixedSplit, split
from benchmarks.shapes import TINY
from benchmarks.shared_adapters import load_shared, name_of
from benchmarks.synthetic import write_model
from slora_jax import Engine, SamplingParams
from slora_jax.pool.allocator import PagePool, PageUse


def make(adapter_pages: int) -> tuple[PagePool, FixedSplit]:
    pool = PagePool(21)
    return pool, FixedSplit(pool, 8, lambda name: int(name[1:]), adapter_pages=adapter_pages)


def test_neither_side_takes_the_others_pages():
    pool, cache = make(8)
    assert cache.room == 12
    assert cache.acquire("a5") is not None
    assert cache.room == 12
    assert cache.acquire("b4") is None  # 3 of 8 are left, whatever KV has
    cache.release("a5")
    assert cache.acquire("b4", reserve=13) is None
    assert cache.acquire("b4", reserve=12) is not None
    assert list(cache.residents) == ["b4"]
    pool.allocate(12, PageUse.KV)
    assert cache.room == 0
    assert not cache.make_room(1)  # though adapters leave four pages free, and could go
    assert cache.acquire("c4") is not None
    assert set(cache.residents) == {"b4", "c4"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    root = tmp_path_factory.mktemp("split")
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    engine = Engine(
        write_model(root / "model", TINY),
        load_format="dummy",
        num_pages=80,
        decode_batch_sizes=(4,),
        max_lora_rank=16,
        **sizes,
    )
    load_shared(engine, root / "adapters", count=6, ranks=(16, 8))
    return engine


@pytest.mark.long
def test_an_engine_with_fixed_shares_gives_the_same_tokens(engine):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, TINY.vocab_size, (12, 20)).tolist()
    adapters = [name_of(number % 6) for number in range(12)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def serve() -> list[list[int]]:
        for prompt, adapter in zip(prompts, adapters, strict=True):
            engine.add_request(prompt, params, adapter=adapter)
        found = {}
        while engine.has_unfinished:
            for output in engine.step():
                found[output.request_id] = output.token_ids
            used = engine.pool.num_used(PageUse.ADAPTER)
            assert most is None or used <= most
            engine.check()
        return list(found.values())

    most = None
    unified = sorted(serve())
    most = round(0.4 * engine.pool.capacity)
    split(engine, 0.4)
    assert sorted(serve()) == unified
    most = None
    split(engine, None)
    assert sorted(serve()) == unified


def test_a_share_that_holds_no_adapter_or_no_request_is_refused(engine):
    with pytest.raises(ValueError, match="the largest adapter needs"):
        split(engine, 0.05)
    with pytest.raises(ValueError, match="raise --pages"):
        split(engine, 0.97)
