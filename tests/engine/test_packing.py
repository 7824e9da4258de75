# SPDX-License-Identifier: Apache-2.0
"""Packed steps: the smallest bucket, all fields where they belong, padding that does nothing."""

from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.core import FROM_DEVICE, Request, RowPlan, SamplingParams, StepPlan
from slora_jax.engine import packing, sampler
from slora_jax.engine.packing import Buckets, pack_step
from slora_jax.engine.sampler import TokenCounts
from slora_jax.model.inputs import Bucket, StepInputs, resolve_tokens


def row(slot: int, length: int, start: int, adapter_slot: int | None = None, **fields) -> RowPlan:
    """A part of a request; its first token is unknown to the host, as a decode's is."""
    values = {"params": SamplingParams(), "samples": True, "position": 0} | fields
    samples, position = values.pop("samples"), values.pop("position")
    request = Request(id=str(slot), prompt=[0], **values)
    tokens = (FROM_DEVICE, *range(100 * slot + 1, 100 * slot + length))
    return RowPlan(request, slot, adapter_slot, start, tokens, samples, position)


def plan_of(rows: list[RowPlan], page_size: int) -> StepPlan:
    """A plan in the scheduler's order, with the page updates that the rows' tokens need."""
    rows = sorted(rows, key=lambda r: (r.adapter_slot is None, r.adapter_slot or 0))
    updates = [
        (r.slot, column, 1000 * (r.slot + 1) + column)
        for r in rows
        for column in range(-(-r.start // page_size), -(-(r.start + len(r.tokens)) // page_size))
    ]
    return StepPlan(tuple(rows), tuple(updates), (), ())


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepPlan, dict[str, int]]:
    """A plan that obeys the scheduler's limits, often to the last token, and the limits."""
    slots, spare = draw(st.integers(1, 9)), draw(st.integers(0, 200))
    page_size = draw(st.sampled_from([1, 4, 16]))
    limits = {
        "max_num_seqs": slots,
        "max_num_batched_tokens": slots + spare,
        "page_size": page_size,
        "max_loras": 4,
    }
    rows, left = [], slots + spare
    for slot in draw(st.permutations(range(slots)))[: draw(st.integers(1, slots))]:
        length = draw(st.integers(1, left - (slots - len(rows) - 1)) | st.just(1))
        left -= length
        adapter_slot = draw(st.none() | st.integers(0, 3))
        rows.append(row(slot, length, draw(st.integers(0, 40)), adapter_slot))
    return plan_of(rows, page_size), limits


@given(steps())
def test_what_is_packed_comes_out_where_it_belongs(step):
    plan, limits = step
    slots, page_size = limits["max_num_seqs"], limits["page_size"]
    bucket = Buckets(**limits).of(plan)
    found = StepInputs.unpack(pack_step(plan, bucket, slots), bucket)

    rows = plan.rows
    lengths = [len(r.tokens) for r in rows]
    runs = [
        (adapter_slot, [len(r.tokens) for r in run])
        for adapter_slot, run in groupby(rows, lambda r: r.adapter_slot)
        if adapter_slot is not None
    ]
    expected = {  # values, and what fills the rest
        "tokens": ([token for r in rows for token in r.tokens], 0),
        "positions": ([r.start + i for r in rows for i in range(len(r.tokens))], 0),
        "row": ([i for i, length in enumerate(lengths) for _ in range(length)], bucket.rows),
        "slot": ([r.slot for r in rows], slots),
        "query_start": ([sum(lengths[:i]) for i in range(len(rows))], 0),
        "query_len": (lengths, 0),
        "context_len": ([r.start + len(r.tokens) for r in rows], 0),
        "segment_slot": ([adapter_slot for adapter_slot, _ in runs], 0),
        "segment_tokens": ([sum(run) for _, run in runs], 0),
        "segment_rows": ([len(run) for _, run in runs], 0),
        "update_slot": ([slot for slot, _, _ in plan.page_updates], slots),
        "update_column": ([column for _, column, _ in plan.page_updates], 0),
        "update_page": ([page for _, _, page in plan.page_updates], 0),
    }
    sizes = StepInputs.sizes(bucket)
    assert expected.keys() == sizes.keys()
    for name, (values, fill) in expected.items():
        padded = values + [fill] * (sizes[name] - len(values))
        assert getattr(found, name).tolist() == padded, name
    assert len(plan.page_updates) <= plan.num_tokens // page_size + len(rows)


@given(st.integers(1, 70))
def test_decodes_take_the_next_power_of_two(max_num_seqs):
    buckets = Buckets(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=128, max_loras=4, page_size=16
    )
    for count in range(1, max_num_seqs + 1):
        rows = min(1 << (count - 1).bit_length(), max_num_seqs)
        plan = plan_of([row(slot, 1, 15) for slot in range(count)], 16)
        assert buckets.of(plan) == Bucket(rows, rows, min(rows, 4), rows)


@settings(max_examples=25)
@given(st.integers(2, 600))
def test_prompts_take_the_smallest_of_a_few_sizes(max_num_batched_tokens):
    buckets = Buckets(
        max_num_seqs=2, max_num_batched_tokens=max_num_batched_tokens, max_loras=4, page_size=16
    )
    found = {
        length: buckets.of(plan_of([row(0, length, 0)], 16)).tokens
        for length in range(2, max_num_batched_tokens + 1)
    }
    sizes = set(found.values())
    assert len(sizes) <= 3
    for length, size in found.items():
        assert size == min(n for n in sizes if n >= length)
    assert max(sizes) == max(max_num_batched_tokens, 16)


def test_a_plan_that_overflows_its_bucket_is_refused():
    plan = plan_of([row(0, 3, 0, adapter_slot=1), row(1, 1, 0)], 16)
    for bucket in (
        Bucket(3, 2, 2, 2),
        Bucket(4, 1, 2, 2),
        Bucket(4, 2, 0, 2),
        Bucket(4, 2, 2, 1),
    ):
        with pytest.raises(ValueError, match="entries, the bucket"):
            pack_step(plan, bucket, 4)


def test_tokens_unknown_to_the_host_come_from_their_slot():
    plan = plan_of([row(2, 1, 8), row(0, 3, 4, adapter_slot=1), row(3, 1, 9)], 4)
    bucket = Bucket(8, 4, 4, 6)
    inputs = StepInputs.unpack(jnp.asarray(pack_step(plan, bucket, 4)), bucket)
    tokens = resolve_tokens(inputs, jnp.array([70, 71, 72, 73]))
    assert tokens.tolist() == [70, 1, 2, 72, 73, 0, 0, 0]


def test_sampling_inputs_are_the_requests_own_and_padding_is_greedy():
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)
    all_tokens = [SamplingParams(top_k=k) for k in (0, -1)]
    rows = [row(0, 1, 0, params=params, seed=2**31 - 1, position=9)]
    rows += [row(1, 1, 0, params=p, seed=3) for p in all_tokens]
    found = packing.sampling(rows, 4, vocab=50)
    assert found.temperature.tolist() == [0.5, 1, 1, 0]
    assert found.top_k.tolist() == [7, 50, 50, 50]
    assert found.top_p.tolist() == [0.25, 1, 1, 1]
    assert found.min_p.tolist() == [0.125, 0, 0, 0]
    assert found.seed.tolist() == [2**31 - 1, 3, 3, 0]
    assert found.position.tolist() == [9, 0, 0, 0]
    assert {np.asarray(x).dtype.name for x in (found.top_k, found.seed)} == {"int32"}


def test_penalties_are_the_requests_own_and_padding_has_none():
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.75)
    found = packing.penalties([row(0, 1, 0, params=params)], 2)
    assert found.repetition.tolist() == [1.5, 1]
    assert found.presence.tolist() == [0.25, 0]
    assert found.frequency.tolist() == [0.75, 0]


@pytest.mark.parametrize("tiny", [1e-300, 5e-324, 1e-45, 1e-38])
def test_tiny_values_are_not_taken_for_zero(tiny):
    """float32 has none of them: the sampler would keep no token, or divide by nothing."""
    params = SamplingParams(top_p=tiny, repetition_penalty=tiny)
    rows = [row(0, 1, 0, params=params, seed=1)]
    top_p, repetition = packing.sampling(rows, 1, 50).top_p, packing.penalties(rows, 1).repetition
    logits, floats = jnp.array([[1.0, 9.0, -3.0]]), np.float32
    assert top_p.dtype == repetition.dtype == floats
    assert 0 < top_p[0] < 1e-20
    one = packing.sampling(rows, 1, 50)
    assert int(sampler.sample(logits, jax.tree.map(jnp.asarray, one))[0]) == 1
    counts = TokenCounts(jnp.array([[0, 1, 1]]), jnp.zeros((1, 3), bool))
    penalties = jax.tree.map(jnp.asarray, packing.penalties(rows, 1))
    found = sampler.penalize(logits, counts, jnp.array([0]), penalties)
    assert np.isfinite(found).all()
    assert int(sampler.greedy(found)[0]) == 1


@pytest.mark.parametrize(
    ("samples", "position", "banned"), [(True, 1, {5, 6}), (True, 2, set()), (False, 1, set())]
)
def test_stop_tokens_are_banned_until_min_tokens(samples, position, banned):
    params = SamplingParams(min_tokens=2, max_tokens=4)
    stops = frozenset({5, 6})
    one = row(0, 1, 0, params=params, stop_ids=stops, samples=samples, position=position)
    assert packing.banned_ids(one) == banned
