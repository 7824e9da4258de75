# SPDX-License-Identifier: Apache-2.0
"""A request's greedy tokens don't depend on its batch, its chunks, or its preemptions."""

import random

import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.cli.demo import PROMPTS
from slora_jax.demo import BASE_MODEL, adapter_dirs

GREEDY = SamplingParams(temperature=0, max_tokens=48)
LONG = "the quick brown fox jumps over it"  # several chunks of the smaller budgets
CASES = [(prompt, name) for prompt in (PROMPTS[0], LONG) for name in (None, *adapter_dirs())]


def make_engine(budget: int) -> Engine:
    """A pool that holds some adapters and some requests, never all."""
    return Engine(
        BASE_MODEL,
        adapters=adapter_dirs(),
        dtype="float32",
        num_pages=144,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        decode_batch_sizes=(8,),
    )


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str | None], list[int]]:
    """Every case served as the only request of an engine."""
    engine = make_engine(64)
    tokens = {}
    for prompt, name in CASES:
        [output] = engine.generate([prompt], GREEDY, adapters=[name])
        tokens[prompt, name] = output.token_ids
    return tokens


@pytest.mark.parametrize(
    "budget", [16, *(pytest.param(budget, marks=pytest.mark.long) for budget in (32, 64))]
)
def test_mixed_batches(alone, budget):
    """Many batches; requests arrive while others run, and are preempted at random."""
    engine, rng = make_engine(budget), random.Random(budget)
    for _ in range(5 if budget == 16 else 8):
        coming = rng.choices(CASES, k=rng.randint(6, 24))
        cases, got = {}, {}
        while coming or engine.has_unfinished:
            for prompt, name in coming[: rng.randint(0, 4)]:
                cases[engine.add_request(prompt, GREEDY, adapter=name)] = prompt, name
                coming = coming[1:]
            for output in engine.step():
                got[output.request_id] = output.token_ids
            if engine.scheduler.running and rng.random() < 0.1:
                engine.scheduler.preempt(engine.scheduler.running[-1])
            engine.check()
        assert got == {request_id: alone[case] for request_id, case in cases.items()}
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool_usage()["kv"] == 0
