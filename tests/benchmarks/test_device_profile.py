# SPDX-License-Identifier: Apache-2.0
"""Busy and idle, by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.device_profile import busy_us, device_use, use_of


def test_overlapping_kernels_count_once():
    use = use_of([(50.0, 60.0), (0.0, 10.0), (5.0, 20.0), (8.0, 12.0), (90.0, 100.0)])
    assert use is not None
    assert use.launches == 5
    assert use.seconds == pytest.approx(100e-9)
    assert use.busy == pytest.approx(40e-9)


def test_kernels_back_to_back_leave_nothing_idle():
    use = use_of([(0.0, 10.0), (10.0, 30.0)])
    assert use is not None
    assert use.busy == pytest.approx(use.seconds)
    assert use_of([]) is None


def test_a_cpus_trace_has_no_gpu(tmp_path):
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jnp.ones(3) + 1)
    assert device_use(tmp_path) is None


def test_nothing_is_said_of_a_cpu():
    assert busy_us(lambda carry: carry + 1, 1) == (None, 1)
