# SPDX-License-Identifier: Apache-2.0
"""What an engine says of itself is so."""

import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.demo import BASE_MODEL, adapter_dirs

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        BASE_MODEL,
        adapters={name: adapter_dirs()[name] for name in ("upper", "rot13")},
        num_pages=200,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        decode_batch_sizes=(2,),
        max_loras=2,
    )


def test_the_life_of_requests(engine):
    idle = engine.stats()
    assert (idle.running, idle.waiting, idle.kv_pages, idle.loaded) == (0, 0, 0, 2)
    assert idle.free_pages == idle.pages
    assert idle.residents == ()
    engine.generate(["hello"], PARAMS, adapters="upper")
    [resident] = engine.stats().residents
    assert (resident.names, resident.users, resident.rank) == (("upper",), 0, 4)
    for adapter in ("upper", "upper", "rot13", None):  # two of them wait
        engine.add_request("hello", PARAMS, adapter=adapter)
    assert engine.stats().waiting_adapters == ("upper", "rot13")
    engine.step()
    now = engine.stats()
    assert (now.running, now.waiting) == (2, 2)
    assert (now.running_adapters, now.waiting_adapters) == (("upper",), ("rot13",))
    assert now.kv_pages > 0
    in_use = {name: one.users for one in now.residents for name in one.names}
    assert in_use["upper"] == 2
    assert now.pages == now.kv_pages + now.free_pages + sum(one.pages for one in now.residents)
    list(engine.stream())
    done = engine.stats()
    assert (done.running, done.waiting, done.kv_pages) == (0, 0, 0)
    assert {one.names: one.users for one in done.residents} == {("upper",): 0, ("rot13",): 0}
    assert (done.hits, done.misses) == (2, 2)
    assert done.steps > now.steps
    assert done.in_host_memory == 2


def test_loads_are_handed_out_once(engine):
    seconds = engine.stats().load_seconds
    assert all(second > 0 for second in seconds)
    assert engine.stats().load_seconds == ()


def test_pinned_adapters_are_marked(engine):
    engine.pin_adapter("upper")
    engine.generate(["hello"], PARAMS, adapters="upper")
    marked = {one.names: one.pinned for one in engine.stats().residents}
    engine.unpin_adapter("upper")
    assert marked[("upper",)]
    assert not any(one.pinned for one in engine.stats().residents)


def test_how_long_requests_were_queued(engine):
    """Those that find no place in the batch wait for those that are in it."""
    for _ in range(4):
        engine.add_request("hello", PARAMS)
    waited: dict[str, float] = {}
    for output in engine.stream():
        assert output.queue_seconds is not None
        assert waited.setdefault(output.request_id, output.queue_seconds) == output.queue_seconds
    first, second, third, fourth = waited.values()
    assert max(first, second) < min(third, fourth)
