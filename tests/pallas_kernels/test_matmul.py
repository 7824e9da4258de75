# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the projection of few tokens."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import silu_gated, skinny_matmul
from pallas_kernels.layout import ceil_div
from pallas_kernels.skinny_matmul import mosaic
from pallas_kernels.skinny_matmul.tuning import LEAST_STAGES, SHARED_BYTES, TUNING, Plan
from tests.pallas_kernels.pages import assert_close, rounded

H200 = TUNING["NVIDIA H200"]
SHAPES = {  # tokens, outputs, inputs, and how Mosaic is to deal them out
    "one token": (1, 128, 128, Plan(64, 1, 3)),
    "more steps than stages": (8, 128, 320, Plan(128, 1, 3)),
    "padded tokens": (12, 128, 128, Plan(128, 1, 3)),
    "a last tile past the outputs": (16, 192, 128, Plan(128, 1, 3)),
    "a cluster splits the inputs": (20, 128, 320, Plan(64, 2, 3)),
    "a part without tokens to finish": (8, 64, 192, Plan(64, 2, 3)),
    "steps of two tiles": (16, 128, 256, Plan(128, 1, 3, step=128)),
    "staggered": (16, 192, 320, Plan(64, 1, 3, stagger=True)),
    "odd outputs": (3, 96, 64, Plan(64, 1, 3)),
    "odd inputs": (3, 64, 96, Plan(64, 1, 3)),
    "not few tokens": (130, 64, 64, Plan(64, 1, 3)),
}


@pytest.fixture(autouse=True)
def _own_kernel(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.skip("Triton has no kernel of its own for it: XLA's is taken")


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "plan"), SHAPES.values(), ids=SHAPES)
def test_matmul(backend, dtype, monkeypatch, tokens, outputs, inputs, plan):
    tuning = replace(H200, plans={(outputs, inputs): plan})
    monkeypatch.setitem(TUNING, jax.devices()[0].device_kind, tuning)
    rng = np.random.default_rng(0)
    x, w = (rounded(rng.standard_normal((n, inputs))) for n in (tokens, outputs))
    got = jax.jit(partial(skinny_matmul, backend=backend))(
        jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    )
    assert got.dtype == dtype
    assert_close(got, x.astype(np.float64) @ w.astype(np.float64).T)


GATED = {  # tokens, outputs of each half, inputs, and the plan
    "one token": (1, 64, 128, Plan(128, 1, 3, gated=True)),
    "more steps than stages": (8, 128, 320, Plan(128, 1, 3, gated=True)),
    "padded tokens, two warpgroups": (12, 128, 128, Plan(256, 1, 3, gated=True)),
    "a last tile past the outputs": (16, 192, 128, Plan(256, 1, 3, step=128, gated=True)),
    "odd outputs": (3, 96, 64, Plan(128, 1, 3, gated=True)),
    "not few tokens": (130, 64, 64, Plan(128, 1, 3, gated=True)),
}


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "plan"), GATED.values(), ids=GATED)
def test_gated(backend, dtype, monkeypatch, tokens, outputs, inputs, plan):
    tuning = replace(H200, gated={(2 * outputs, inputs): plan})
    monkeypatch.setitem(TUNING, jax.devices()[0].device_kind, tuning)
    rng = np.random.default_rng(0)
    x, w = (rounded(rng.standard_normal((n, inputs))) for n in (tokens, 2 * outputs))
    w[:outputs] *= 0.3  # SiLU where it bends
    got = jax.jit(partial(skinny_matmul, gated=True, backend=backend))(
        jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    )
    assert got.dtype == dtype
    assert got.shape == (tokens, outputs)
    y = x.astype(np.float64) @ np.asarray(jnp.asarray(w, dtype), np.float64).T
    gate, up = np.split(y, 2, axis=1)
    assert_close(got, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("split", [2, 4])
def test_whole_sums_are_those_that_are_gated(backend, monkeypatch, split):
    """Though the plan of these weights deals out their inputs."""
    inputs, outputs = 1024, 64
    shape, step = (2 * outputs, inputs), 128
    plans = {shape: Plan(64, split, 3, step=step)}, {shape: Plan(128, 1, 3, step=step, gated=True)}
    tuning = replace(H200, plans=plans[0], gated=plans[1])
    monkeypatch.setitem(TUNING, jax.devices()[0].device_kind, tuning)
    x, w = (jax.random.normal(jax.random.key(n), (n, inputs), jnp.bfloat16) for n in (16, 128))
    gated, whole = (
        jax.jit(partial(skinny_matmul, backend=backend, **how))(x, w)
        for how in ({"gated": True}, {"whole": True})
    )
    np.testing.assert_array_equal(np.asarray(jax.jit(silu_gated)(whole)), np.asarray(gated))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_silu_is_rounded_once(dtype):
    y = np.random.default_rng(0).normal(0, 3, (64, 512))
    y = np.asarray(jnp.asarray(y, dtype), np.float64)
    gate, up = np.split(y, 2, axis=1)
    got = np.asarray(jax.jit(silu_gated)(jnp.asarray(y, dtype)), np.float64)
    half = float(jnp.finfo(dtype).eps) / 2  # a unit's in the last place
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1.01 * half, atol=1e-7)


@pytest.mark.parametrize("plan", [Plan(128, 1, 3), Plan(128, 2, 3, gated=True)], ids=str)
def test_a_plan_that_cannot_gate_is_refused(plan):
    with pytest.raises(ValueError, match="gated"):
        mosaic.skinny_matmul(jnp.ones((16, 128)), jnp.ones((128, 128)), gated=True, plan=plan)


@pytest.mark.parametrize("plan", [Plan(64, 2, 3), Plan(64, 1, 3, stagger=True)], ids=str)
def test_a_plan_of_other_sums_is_refused(plan):
    with pytest.raises(ValueError, match="order"):
        mosaic.skinny_matmul(jnp.ones((16, 256)), jnp.ones((64, 256)), whole=True, plan=plan)


def test_a_plan_with_more_parts_than_steps_is_refused():
    with pytest.raises(ValueError, match="no step"):
        mosaic.skinny_matmul(jnp.ones((16, 64)), jnp.ones((64, 64)), plan=Plan(64, 2, 3))


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 128),
    outputs=st.integers(1, 500),
    inputs=st.integers(1, 500),
    gated=st.booleans(),
    whole=st.booleans(),
)
def test_every_shape_has_a_plan(tokens, outputs, inputs, gated, whole):
    """One that fits into shared memory, and in which every token's sum is finished once."""
    plan = H200.plan(tokens, 64 * outputs * (1 + gated), 64 * inputs, gated=gated, whole=whole)
    assert plan.gated == gated
    assert plan.whole or not (gated or whole)
    assert LEAST_STAGES <= plan.stages(tokens) <= plan.most_stages
    assert inputs * 64 % plan.step == 0
    assert plan.split <= inputs * 64 // plan.step  # each part has something to do
    shares = plan.columns(tokens) // plan.share(tokens)
    assert ceil_div(tokens, plan.share(tokens)) == shares <= plan.split
    operands = plan.stages(tokens) * (plan.rows + plan.columns(tokens)) * plan.step * 2
    results = plan.outputs * plan.share(tokens) * (2 + (4 * plan.split if plan.split > 1 else 0))
    assert operands + results <= SHARED_BYTES
