# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding against its definition: pairs of numbers as complex ones, turned."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope_kv_write.reference import rotate
from slora_jax.config import Llama3Rope, ModelConfig
from slora_jax.model.rope import inverse_frequencies, rotation

STRETCHED = Llama3Rope(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def config(
    head_dim: int = 128, rope_theta: float = 500000.0, rope_scaling: Llama3Rope | None = None
) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Dimension i of the first half and of the second are one complex number."""
    half = x.shape[-1] // 2
    numbers = x[..., :half] + 1j * x[..., half:]
    numbers = numbers * np.exp(1j * positions[:, None, None] * frequencies)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_pairs_turn_by_position_times_frequency(head_dim, theta):
    positions = np.array([0, 1, 2, 37, 500])
    x = np.random.default_rng(0).normal(size=(5, 3, head_dim)).astype(np.float32)
    frequencies = theta ** -(np.arange(head_dim // 2) / (head_dim / 2))
    cos, sin = rotation(jnp.asarray(positions), config(head_dim, theta))
    found = rotate(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(found, turned(x, positions, frequencies), atol=2e-4)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 64)).astype(np.float32)
    scores = []
    for start in (0, 5, 900):
        cos, sin = rotation(jnp.array([start + 11, start]), config(64, rope_scaling=STRETCHED))
        rotated = rotate(jnp.concatenate([q, k]), cos, sin)
        scores.append(float(jnp.vdot(rotated[0], rotated[1])))
    np.testing.assert_allclose(scores, scores[0], atol=1e-2)


def test_angles_are_float32_and_the_rotated_keep_their_dtype():
    cos, sin = rotation(jnp.array([4000]), config(64))
    assert cos.dtype == sin.dtype == jnp.float32
    assert rotate(jnp.ones((1, 1, 64), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def stretch(frequency: np.ndarray) -> np.ndarray:
    """How many times slower each wave has become."""
    return frequency / inverse_frequencies(config(rope_scaling=STRETCHED))


def test_llama3_keeps_short_waves_and_slows_long_ones():
    frequency = inverse_frequencies(config())
    wavelength = 2 * math.pi / frequency
    factor = stretch(frequency)
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.sum() >= 3
    np.testing.assert_array_equal(factor[short], 1)
    np.testing.assert_allclose(factor[long], 8, rtol=1e-6)
    assert (np.diff(factor[between]) > 0).all()
    assert ((factor[between] > 1) & (factor[between] < 8)).all()


def test_llama3_blends_by_the_waves_that_fit_the_window():
    """Halfway between 1 and 4 waves a window, a frequency is the mean of slowed and kept."""
    frequency = inverse_frequencies(config())
    slowed = 1 / stretch(frequency)  # of 1: 1/8 at one wave a window, 1 at four
    waves = frequency * 8192 / (2 * math.pi)
    expected = np.interp(waves, [1, 4], [1 / 8, 1])
    np.testing.assert_allclose(slowed, expected, rtol=1e-5)


@pytest.mark.parametrize("edge", [1.0, 4.0])
def test_llama3_is_continuous_where_the_blend_begins_and_ends(edge):
    """A window that makes one wave's length fall just before or after an edge changes little."""
    wave = 20
    wavelength = 2 * math.pi / float(inverse_frequencies(config())[wave])
    found = []
    for nudge in (-1, 1):
        window = round(edge * wavelength) + nudge
        scaling = Llama3Rope(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=window,
        )
        found.append(inverse_frequencies(config(rope_scaling=scaling))[wave])
    np.testing.assert_allclose(found[0], found[1], rtol=0.02)
