# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens on the device: small programs that a step chains as its requests need them.

A batch of greedy requests runs `greedy` and nothing else. Penalties and banned tokens come before
the choice; log-probabilities are of the model's own logits, beside it.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slora_jax.core import NO_TOKEN

_LEAST_TEMPERATURE = 1e-5

HostOrDevice = np.ndarray | Array


@struct.dataclass
class SamplingInputs:
    """One value a row; `seed` and `position` make the randomness of a token independent of batch,
    chunking and preemption."""

    temperature: Float[HostOrDevice, " B"]  # 0: greedy
    top_k: Int[HostOrDevice, " B"]  # V: all
    top_p: Float[HostOrDevice, " B"]
    min_p: Float[HostOrDevice, " B"]
    seed: Int[HostOrDevice, " B"]
    position: Int[HostOrDevice, " B"]  # of the token in the output


@struct.dataclass
class PenaltyInputs:
    """One value a row."""

    repetition: Float[HostOrDevice, " B"]
    presence: Float[HostOrDevice, " B"]
    frequency: Float[HostOrDevice, " B"]


@struct.dataclass
class TokenCounts:
    """What each slot's request has said so far: state of the penalties, kept on the device."""

    output: Int[Array, "slots V"]
    in_prompt: Bool[Array, "slots V"]

    @classmethod
    def zeros(cls, slots: int, vocab: int) -> "TokenCounts":
        return cls(jnp.zeros((slots, vocab), jnp.int32), jnp.zeros((slots, vocab), bool))


class Logprobs(NamedTuple):
    """Of n positions: the k most likely tokens, and the one that was chosen (or given)."""

    top: Float[Array, "n k"]
    top_ids: Int[Array, "n k"]
    chosen: Float[Array, " n"]
    chosen_rank: Int[Array, " n"]  # 1: the most likely


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The most likely token; the lowest id among equals; NO_TOKEN if there is NaN or infinity."""
    return _or_no_token(logits, jnp.argmax(logits, axis=-1))


def sample(logits: Float[Array, "B V"], inputs: SamplingInputs) -> Int[Array, " B"]:
    """Draws from the distribution left by temperature, min-p, top-k and top-p, in that order."""
    drawn = _or_no_token(logits, jax.vmap(_draw)(logits, inputs))
    return jnp.where(inputs.temperature < _LEAST_TEMPERATURE, greedy(logits), drawn)


def _or_no_token(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Int[Array, " B"]:
    """Says so where a model, or an adapter, has overflowed; banned tokens' -inf is no overflow."""
    finite = jnp.isfinite(logits.max(axis=-1))
    return jnp.where(finite, tokens, NO_TOKEN).astype(jnp.int32)


def _draw(logits: Float[Array, " V"], row: SamplingInputs) -> Int[Array, ""]:
    """One row of `sample`. All cuts keep a prefix of the tokens sorted by likelihood."""
    logits = logits / jnp.maximum(row.temperature, _LEAST_TEMPERATURE)
    ordered = -jnp.sort(-logits)
    rank = jnp.arange(ordered.shape[0])
    kept = (rank < row.top_k) & (ordered >= ordered[0] + jnp.log(row.min_p))
    probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf))
    # The token that crosses top_p is part of the smallest set that reaches it.
    kept &= jnp.cumsum(probability) - probability < row.top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf))
    key = jax.random.fold_in(jax.random.key(row.seed), row.position)
    noisy = logits + jax.random.gumbel(key, logits.shape)
    return jnp.argmax(jnp.where(logits >= least, noisy, -jnp.inf)).astype(jnp.int32)


def penalize(
    logits: Float[Array, "B V"],
    counts: TokenCounts,
    slot: Int[Array, " B"],
    inputs: PenaltyInputs,
) -> Float[Array, "B V"]:
    """Repetition penalty over prompt and output, then presence and frequency over the output."""
    output = counts.output.at[slot].get(mode="clip")
    seen = (output > 0) | counts.in_prompt.at[slot].get(mode="clip")
    factor = jnp.where(seen, inputs.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - inputs.frequency[:, None] * output
    return logits - inputs.presence[:, None] * (output > 0)


def count(counts: TokenCounts, slot: Int[Array, " B"], tokens: Int[Array, " B"]) -> TokenCounts:
    """Counts each row's new token; rows whose slot is out of range count nothing."""
    return replace(counts, output=counts.output.at[slot, tokens].add(1, mode="drop"))


def reset_counts(
    counts: TokenCounts,
    slot: Int[Array, ""],
    output: Int[Array, " V"],
    in_prompt: Bool[Array, " V"],
) -> TokenCounts:
    """Starts a slot with the tokens that its request brings."""
    return TokenCounts(counts.output.at[slot].set(output), counts.in_prompt.at[slot].set(in_prompt))


def ban(logits: Float[Array, "B V"], ids: Int[Array, "B n"]) -> Float[Array, "B V"]:
    """Makes tokens impossible; ids out of range are padding."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].set(-jnp.inf, mode="drop")


def logprobs(logits: Float[Array, "n V"], tokens: Int[Array, " n"], k: int) -> Logprobs:
    """Log-probabilities of the k most likely tokens and of `tokens`."""
    logp = jax.nn.log_softmax(logits)
    top, ids = jax.lax.top_k(logp, k)
    chosen = jnp.take_along_axis(logp, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(logp > chosen, axis=1)
    return Logprobs(top, ids, chosen[:, 0], rank.astype(jnp.int32))
