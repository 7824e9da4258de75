# SPDX-License-Identifier: Apache-2.0
"""What the devices tell each other in a step, counted in the traced program."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from slora_jax.engine import programs
from tests.engine.shapes import TINY, step_shapes

RANK, ROWS = 64, 8
LAYERS, HIDDEN = TINY.num_hidden_layers, TINY.hidden_size
ALL = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def collectives(jaxpr: core.Jaxpr) -> Iterator[tuple[str, int]]:
    """Name and result's elements of every collective, wherever in the program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("psum", "psum_invariant", "all_gather", "all_to_all", "ppermute", "pmax"):
            yield name.removesuffix("_invariant"), sum(out.aval.size for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from collectives(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from collectives(inner)


def count(devices: int, partition: str, lora_mode: str, adapted=ALL) -> Counter:
    """Collectives of a decode step, by name and size."""
    args, shape = step_shapes(
        TINY,
        pages=16,
        rows=ROWS,
        tokens=ROWS,
        lora_mode=lora_mode,
        dtype=jnp.float32,
        max_rank=RANK,
        devices=devices,
        partition=partition,
    )
    traced = programs.model_step.trace(*args, shape=replace(shape, adapted=adapted))
    return Counter(collectives(traced.jaxpr.jaxpr))


def base(devices: int) -> Counter:
    """Two all-reduces a layer and one for the embedding, and one all-gather of the logits."""
    vocab = programs.ModelShards(TINY, devices).local.vocab_size * devices
    sums = 2 * LAYERS + 1
    return Counter({("psum", ROWS * HIDDEN): sums, ("all_gather", ROWS * vocab): 1})


@pytest.mark.parametrize("lora_mode", ["none", "layers", "all"])
@pytest.mark.parametrize("devices", [2, 4])
def test_no_comm_adds_none(devices, lora_mode):
    assert count(devices, "no-comm", lora_mode) == base(devices)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("adapted", [ATTENTION, ALL], ids=["attention", "all"])
def test_slora_as_published(devices, adapted):
    """An all-gather for q, k and v together, one for gate and up, an all-reduce for o and down."""
    added = count(devices, "slora", "layers", adapted) - base(devices)
    expected = Counter({("all_gather", ROWS * 3 * RANK): LAYERS, ("psum", ROWS * RANK): LAYERS})
    if adapted == ALL:
        expected[("all_gather", ROWS * 2 * RANK)] = LAYERS
        expected[("psum", ROWS * RANK)] = 2 * LAYERS
    assert added == expected
    if adapted == ATTENTION:
        # Section 6.2 of the paper: 5 (N - 1) B r / N a block, a ring's all-reduce taken twice.
        share = (devices - 1) / devices
        sent = sum(
            n * size * share * (2 if name == "psum" else 1) for (name, size), n in added.items()
        )
        assert sent == LAYERS * 5 * (devices - 1) * ROWS * RANK / devices


def test_slora_of_embedding_and_head():
    """The embedding is row-parallel, the head column-parallel."""
    added = count(2, "slora", "all") - count(2, "slora", "layers")
    assert added == Counter({("psum", ROWS * RANK): 1, ("all_gather", ROWS * RANK): 1})


@pytest.mark.parametrize("partition", ["no-comm", "slora"])
def test_one_device_says_nothing(partition):
    assert not count(1, partition, "all")


def test_the_base_model_pays_for_no_adapters():
    assert count(2, "slora", "none") == base(2)


def test_silence():
    args, shape = step_shapes(
        TINY, pages=16, rows=ROWS, tokens=ROWS, lora_mode="all", dtype=jnp.float32,
        devices=2, partition="slora",
    )  # fmt: skip
    traced = programs.model_step.trace(*args, shape=replace(shape, silent=True))
    assert not list(collectives(traced.jaxpr.jaxpr))
    assert traced.out_info[0].shape == (ROWS, TINY.vocab_size)
    assert jax.device_count() >= 2
