# SPDX-License-Identifier: Apache-2.0
"""How axes are dealt out, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import Placement, Split, tensor_mesh
from sharding.specs import POOL, REPLICATED
from slora_jax import Engine
from slora_jax.demo import BASE_MODEL
from slora_jax.model.shards import ModelShards
from tests.sharding.models import GQA, MHA


@given(st.integers(1, 300), st.integers(1, 8), st.sampled_from([1, 8, 64]))
def test_padded_blocks_are_the_axis_and_then_zeros(size, devices, multiple):
    split, axis = Split.padded(size, devices, multiple), np.arange(1, size + 1)
    whole = np.concatenate([split.take(axis, device, axis=0) for device in range(devices)])
    np.testing.assert_array_equal(whole[:size], axis)
    assert not whole[size:].any()
    assert split.width % multiple == 0
    assert len(whole) - size < devices * multiple


@given(st.sampled_from([1, 2, 3, 4, 8, 12]), st.integers(1, 12), st.integers(1, 4))
def test_every_query_head_finds_its_key_value_head(kv_heads, devices, group):
    """Each device's queries ask the heads that it holds, in order, as one device would."""
    heads, head_dim = kv_heads * group, 2
    if heads % devices or (kv_heads % devices and devices % kv_heads):
        return
    q, kv = Split.heads(heads, head_dim, devices), Split.heads(kv_heads, head_dim, devices)
    here_q, here_kv = q.width // head_dim, kv.width // head_dim
    for device in range(devices):
        for mine in range(here_q):
            head = q.starts[device] // head_dim + mine
            held = kv.starts[device] // head_dim + mine // (here_q // here_kv)
            assert held == head // group


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="6 heads and 4 devices"):
        Split.heads(6, 8, 4)


def test_once():
    split, axis = Split.once(3, 4), np.array([1, 2, 3])
    blocks = [split.take(axis, device, axis=0) for device in range(4)]
    np.testing.assert_array_equal(np.sum(blocks, axis=0), axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_take_along_any_axis(axis):
    matrix = np.arange(12).reshape(3, 4)
    size = matrix.shape[axis]
    split = Split.padded(size, 2)
    blocks = [split.take(matrix, device, axis) for device in range(2)]
    whole = np.concatenate(blocks, axis=axis)
    np.testing.assert_array_equal(np.take(whole, range(size), axis), matrix)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_device_puts_its_own_block(devices):
    placement = Placement(tensor_mesh(devices))
    array = placement.put(lambda device: np.full((2, 3, 4), device), (2, 3, 4), POOL)
    assert array.shape == (2, 3, 4 * devices)
    for device, shard in enumerate(array.addressable_shards):
        assert (np.asarray(shard.data) == device).all()
        assert shard.data.shape == (2, 3, 4)
    everywhere = placement.put(lambda _: np.arange(3), (3,), REPLICATED)
    assert all((np.asarray(s.data) == [0, 1, 2]).all() for s in everywhere.addressable_shards)
    assert placement.own == tuple(range(devices))


def test_local_shapes():
    local = ModelShards(GQA, 8).local
    assert (local.num_attention_heads, local.num_key_value_heads) == (1, 1)
    assert local.hidden_size == GQA.hidden_size
    assert local.intermediate_size == 64  # 192 / 8 = 24, rounded up for the kernels
    assert ModelShards(MHA, 1).local == MHA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"tensor_parallel_size": 3}, r"3 does not divide .* it can be one of 1, 2, 4"),
        ({"lora_partition": "both"}, "lora_partition must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(BASE_MODEL, **options)


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 16, but JAX sees 8 devices"):
        tensor_mesh(16, jax.devices()[:8])


def test_too_few_devices_of_several_processes_are_counted_by_process():
    devices = [SimpleNamespace(process_index=n) for n in (0, 0, 1, 1)]
    message = r"sees 4 devices \(2 in process 0, 2 in process 1\): lower it, or give more devices"
    with pytest.raises(ValueError, match=message):
        tensor_mesh(8, devices)


def test_slora_needs_a_hidden_size_that_divides():
    odd = replace(MHA, hidden_size=36)
    with pytest.raises(ValueError, match=r"deals out hidden_size 36.*use 'no-comm'"):
        ModelShards(odd, 8, "slora")
    ModelShards(odd, 8, "no-comm")
