# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, as Hugging Face's Llama computes it."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slora_jax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " D/2"]:
    """Radians a position, for each pair of a head's dimensions; stretched as Llama 3.1 does."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = (1.0 / np.float32(config.rope_theta) ** half).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    window = scaling.original_max_position_embeddings
    low, high = window / scaling.low_freq_factor, window / scaling.high_freq_factor
    # Long waves are slowed by `factor`, short ones kept, those between blended.
    blend = (window / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequency / scaling.factor + blend * frequency
    slowed = np.where(wavelength > low, frequency / scaling.factor, blended)
    return np.where(wavelength < high, frequency, slowed).astype(np.float32)


def rotation(
    positions: Int[Array, " T"], config: ModelConfig
) -> tuple[Float[Array, "T D/2"], Float[Array, "T D/2"]]:
    """Cosine and sine of every token's angles, float32, to be shared by all layers."""
    angle = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)
