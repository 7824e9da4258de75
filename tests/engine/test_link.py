# SPDX-License-Identifier: Apache-2.0
"""What processes of an engine say to each other comes out as it went in, or not at all."""

from dataclasses import fields

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.cluster import ClusterError
from slora_jax.config import EngineConfig
from slora_jax.core import FROM_DEVICE, Install, Request, RowPlan, SamplingParams, StepPlan
from slora_jax.engine.command import StepCommand, step_command
from slora_jax.engine.link import Drop, End, Enter, Read, Stage, decode_command, encode
from slora_jax.engine.packing import buckets_of

V = 50
OPTIONS = EngineConfig(max_num_seqs=6, max_num_batched_tokens=64, max_loras=4)
TOKENS = st.integers(0, V - 1)


@st.composite
def requests(draw: st.DrawFn, slot: int) -> Request:
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_k=draw(st.sampled_from([-1, 1, 9])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        min_tokens=draw(st.sampled_from([0, 3])),
        logprobs=draw(st.sampled_from([None, 0, 4, -1])),
        prompt_logprobs=draw(st.sampled_from([None, 2])),
    )
    return Request(
        id=str(slot),
        prompt=draw(st.lists(TOKENS, min_size=1, max_size=12)),
        params=params,
        seed=draw(st.integers(0, 2**31 - 1)),
        stop_ids=frozenset(draw(st.sets(TOKENS, max_size=3))),
        output=draw(st.lists(TOKENS, max_size=5)),
        slot=slot,
    )


@st.composite
def commands(draw: st.DrawFn) -> StepCommand:
    """Of plans with any mixture of prompts, decodes, adapters and parameters."""
    slots = draw(st.permutations(range(6)))[: draw(st.integers(1, 6))]
    adapters = sorted(draw(st.integers(0, 4)) for _ in slots)  # 4: the base model, the last
    rows = []
    for slot, adapter in zip(slots, adapters, strict=True):
        request = draw(requests(slot))
        decodes = draw(st.booleans())
        tokens = (FROM_DEVICE,) if decodes else tuple(request.prompt)
        start = len(request.prompt) if decodes else 0
        index = None if adapter == 4 else adapter
        rows.append(RowPlan(request, slot, index, start, tokens, draw(st.booleans()), 1))
    started = tuple(row.request for row in rows if draw(st.booleans()))
    updates = tuple((slot, 0, 7) for slot in slots[:2])
    adapted = frozenset(draw(st.sets(st.sampled_from(["q_proj", "o_proj", "lm_head"]))))
    outer = draw(st.sets(st.integers(0, 3)))
    plan = StepPlan(tuple(rows), updates, (), started)
    return step_command(plan, buckets_of(OPTIONS), OPTIONS, V, outer, adapted)


def same(one: object, other: object) -> bool:
    """Whether two values are equal in type, shape and content, arrays in them too."""
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if type(one) is not type(other):
        return False
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(commands())
def test_a_step_comes_out_as_it_went_in(command):
    found = decode_command(encode(command))
    assert same(found, command)
    assert found.packed.flags.aligned


@pytest.mark.parametrize(
    "command",
    [
        Read(1, "/a/directory"),
        Stage(2, "an id", "/a/directory"),
        Drop(()),
        Drop((1, 2, 3)),
        Enter(Install("an id", 3, (5, 6)), 2),
        End(),
    ],
)
def test_other_commands_come_out_as_they_went_in(command):
    assert decode_command(encode(command)) == command


def mutations(value: object, path: tuple = ()):
    """Places in nested lists."""
    yield path
    if isinstance(value, list):
        for n, one in enumerate(value):
            yield from mutations(one, (*path, n))


@given(commands(), st.data())
def test_a_step_with_another_value_somewhere_is_a_step_or_refused(command, data):
    """Above all, no array is of another size than its bytes, or of another type than its place."""
    message = msgspec.msgpack.decode(encode(command))
    path = data.draw(st.sampled_from([p for p in mutations(message) if p]))
    place = message
    for n in path[:-1]:
        place = place[n]
    other = [
        -1,
        0,
        2**40,
        2**64 - 1,
        "int32",
        "float32",
        "object",
        b"",
        b"\0" * 8,
        [],
        [2, 2],
        None,
    ]
    place[path[-1]] = data.draw(st.sampled_from(other))
    try:
        found = decode_command(msgspec.msgpack.encode(message))
    except ClusterError:
        return
    assert isinstance(found, StepCommand)
    assert found.packed.dtype == np.int32
    assert found.choice.slot.dtype == np.int32
    if found.choice.sampling is not None:
        assert found.choice.sampling.temperature.dtype == np.float32


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (["object", [1], b"8" * 8], "not understood"),  # NumPy would read pointers from its bytes
        (["float32", [2], b"4444" * 2], "float32.* in the place of one of int32"),
        (["int32", [3], b"4444" * 2], r"int32\[3\] of 8 bytes"),
        (["int32", [2**62], b""], "of 0 bytes"),
        (["int32", [-2], b"4444" * 2], r"int32\[-2\]"),
        (["int32", [1, 2], b"4444" * 2], r"int32\[1, 2\]"),
        (["int32", [], b"4444"], r"int32\[\]"),
    ],
)
def test_an_array_is_of_the_size_and_the_type_of_its_place(array, message):
    slot = ["int32", [1], b"4444"]
    step = ["Step", [1, 1, 1, 1], True, "none", [], array, [], slot, None, None, None, None, None]
    with pytest.raises(ClusterError, match=message):
        decode_command(msgspec.msgpack.encode(step))
    step[5] = slot
    decode_command(msgspec.msgpack.encode(step))
