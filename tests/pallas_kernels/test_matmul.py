# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the projection of few tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import skinny_matmul
from pallas_kernels.skinny_matmul import mosaic
from pallas_kernels.skinny_matmul.tuning import TUNING, Plan
from tests.pallas_kernels.pages import assert_close, rounded

SHAPES = {  # tokens, outputs, inputs, and how Mosaic is to deal them out
    "one token": (1, 128, 128, Plan(64, 1, 2)),
    "more steps than stages": (8, 128, 320, Plan(128, 1, 2)),
    "padded tokens": (12, 128, 128, Plan(128, 1, 2)),
    "a last tile past the outputs": (16, 192, 128, Plan(128, 1, 2)),
    "inputs split over a cluster": (20, 128, 256, Plan(64, 2, 2)),
    "a part without a share of the tokens": (8, 64, 192, Plan(64, 2, 2)),
    "long steps": (16, 128, 256, Plan(128, 1, 2, step=128)),
    "outputs that no tile divides": (3, 96, 64, Plan(64, 1, 2)),
    "more than few tokens": (130, 64, 64, Plan(64, 1, 2)),
}


@pytest.fixture
def backend(backend, monkeypatch):
    """Where Mosaic runs in its interpreter, its way of exchanging sums is the one through memory."""
    return backend


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "plan"), SHAPES.values(), ids=SHAPES)
def test_matmul(backend, dtype, monkeypatch, tokens, outputs, inputs, plan):
    rng = np.random.default_rng(0)
    x, w = (rounded(rng.standard_normal((n, inputs))) for n in (tokens, outputs))
