# SPDX-License-Identifier: Apache-2.0
"""What a projection asks of its kernel."""

import jax.numpy as jnp
import pytest

from slora_jax.model import llama, weights
from slora_jax.model.weights import Linear


@pytest.fixture
def asked(monkeypatch):
    """The keywords of every call of `skinny_matmul`."""
    calls = []

    def note(x, weight, **how):
        calls.append({name: how.get(name, False) for name in ("gated", "whole")})
        return jnp.zeros((x.shape[0], weight.shape[0]), x.dtype)

    monkeypatch.setattr(weights, "skinny_matmul", note)
    return calls


X, WEIGHT = jnp.ones((2, 8)), jnp.ones((4, 8))


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")])
def test_gates_that_are_adapted_have_the_sums_of_those_that_are_not(asked, names):
    """Else a token's numbers would depend on whose requests are in its step."""
    unused = dict.fromkeys(("pool", "layer", "lora", "config"))
    llama.project(Linear(WEIGHT), X, names=names, backend="xla", **unused)
    assert asked == [{"gated": False, "whole": names[0] == "gate_proj"}]


def test_gates_with_a_bias_have_the_same_sums(asked):
    Linear(WEIGHT).gated(X)
    Linear(WEIGHT, bias=jnp.ones(4)).gated(X)
    assert asked == [{"gated": True, "whole": False}, {"gated": False, "whole": True}]
