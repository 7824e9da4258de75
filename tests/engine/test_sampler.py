# SPDX-License-Identifier: Apache-2.0
"""The sampler against NumPy: what may be drawn, how often, and that nothing else has a say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slora_jax.engine import sampler
from slora_jax.engine.sampler import PenaltyInputs, SamplingInputs, TokenCounts

sample = jax.jit(sampler.sample)
DRAWS, VOCAB = 4096, 8  # one shape for all that is drawn: compiling takes longer than drawing


def inputs(rows: int = DRAWS, **fields) -> SamplingInputs:
    """Plain sampling, one seed a row, but for `fields`: a value for all rows or one each."""
    defaults = {
        "temperature": 1.0,
        "top_k": 2**30,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": np.arange(rows),
        "position": 0,
    }
    values = {name: np.broadcast_to(value, rows) for name, value in (defaults | fields).items()}
    integers = ("top_k", "seed", "position")
    return SamplingInputs(
        **{name: jnp.asarray(x, int if name in integers else float) for name, x in values.items()}
    )


def draws(logits, **fields) -> np.ndarray:
    """Many draws from one distribution; tokens beyond `logits` are impossible."""
    padded = np.full(VOCAB, -np.inf, np.float32)
    padded[: len(logits)] = logits
    return np.asarray(sample(np.broadcast_to(padded, (DRAWS, VOCAB)), inputs(**fields)))


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum(axis=-1, keepdims=True)


def random_logits(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3


def test_greedy_takes_the_lowest_id_among_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [-1.0, -1.0, -1.0], [-jnp.inf, -5.0, -jnp.inf]])
    tokens = sampler.greedy(logits)
    assert tokens.tolist() == [1, 0, 1]
    assert tokens.dtype == jnp.int32


@settings(max_examples=60)
@given(
    ranks=st.permutations(range(VOCAB)),
    temperature=st.floats(0.5, 2),
    min_p=st.floats(0, 1),
    top_k=st.integers(1, VOCAB),
    top_p=st.floats(0.01, 1),
)
def test_exactly_the_tokens_that_pass_all_cuts_are_drawn(ranks, temperature, min_p, top_k, top_p):
    logits = np.array(ranks) / 4  # the least likely of all has 1 %: in 4096 draws it must appear
    probability = softmax(logits / temperature)
    best = np.sort(probability)[::-1]
    left = best[: min(top_k, np.sum(best >= min_p * best[0]))]
    before = (np.cumsum(left) - left) / left.sum()
    close = np.abs(best / best[0] - min_p).min(), np.abs(before - top_p).min()
    assume(min(close) > 1e-5)  # where rounding decides, either is right
    kept = {int(np.flatnonzero(probability == p)[0]) for p in left[before < top_p]}
    cuts = {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    assert set(draws(logits, **cuts)) == kept


def test_equals_of_the_last_token_kept_are_kept():
    """Which of them a cut would leave out is arbitrary."""
    assert set(draws([0, 1, 3, 1], top_k=2)) == {1, 2, 3}


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_distribution(temperature, varied):
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5])
    many = {"seed": 7, "position": 3, varied: np.arange(DRAWS), "temperature": temperature}
    expected = DRAWS * softmax(logits / temperature)
    found = np.bincount(draws(logits, **many), minlength=5)
    assert np.sum((found - expected) ** 2 / expected) < 23.5  # chi square, 4 degrees: 1 in 10000


def test_what_a_cut_leaves_keeps_its_proportions():
    expected = DRAWS * softmax([1.0, 2.0, 0.5])
    found = np.bincount(draws([0.0, 1.0, -1.0, 2.0, 0.5], top_k=3), minlength=5)[[1, 3, 4]]
    assert np.sum((found - expected) ** 2 / expected) < 18.4  # 2 degrees: 1 in 10000


def test_neighbouring_seeds_and_positions_are_unrelated():
    """Seed 1 at position 0 must not repeat seed 0 at position 1."""
    seed, position = np.divmod(np.arange(DRAWS), 64)
    tokens = draws(np.zeros(VOCAB), seed=seed, position=position).reshape(64, 64)
    assert np.mean(tokens[1:, :-1] == tokens[:-1, 1:]) < 1.5 / VOCAB


@pytest.mark.parametrize("at", [0, 1234, DRAWS - 1])
def test_a_draw_depends_on_its_own_row_only(at):
    mine = {"temperature": 1.5, "top_k": 7, "top_p": 0.95, "min_p": 0.01, "seed": 5, "position": 2}
    others = {"temperature": 0.1, "top_k": 1, "top_p": 0.2, "min_p": 0.5, "seed": 5, "position": 2}
    logits = random_logits(DRAWS, VOCAB)
    is_mine = np.arange(DRAWS) == at
    batch = sample(logits, inputs(**{k: np.where(is_mine, mine[k], others[k]) for k in mine}))
    assert batch[at] == sample(logits[at : at + 1], inputs(1, **mine))[0]


def test_rows_of_temperature_zero_are_greedy():
    temperature = np.arange(DRAWS) % 2 * 1.0
    tokens = draws([1.0, 2.0, 2.0, 0.0], temperature=temperature)
    assert set(tokens[::2]) == {1}
    assert set(tokens[1::2]) == {0, 1, 2, 3}


def test_banned_tokens_are_never_chosen_and_padding_bans_nothing():
    logits = jnp.zeros((2, 4))
    banned = np.asarray(sampler.ban(logits, jnp.array([[3, 0, 4], [4, 4, 4]])))
    assert np.isneginf(banned).tolist() == [[True, False, False, True], [False] * 4]
    assert (banned[1] == logits[1]).all()
    assert set(draws(banned[0])) == {1, 2}


def spoken() -> TokenCounts:
    """What three slots have said, of five tokens."""
    output = jnp.array([[0, 0, 0, 0, 0], [2, 0, 1, 0, 0], [0, 5, 0, 0, 1]])
    in_prompt = jnp.array([[0, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    return TokenCounts(output, in_prompt)


def test_penalties():
    counts, slots = spoken(), [2, 0, 1, 1]
    repetition, presence = [1.5, 2.0, 0.5, 1.0], [0.0, 0.7, -0.5, 0.0]
    frequency = [0.3, 1.0, -0.2, 0.0]
    logits = random_logits(4, 5)
    expected = np.zeros((4, 5))
    for row, token in np.ndindex(4, 5):
        times = int(counts.output[slots[row], token])
        logit = float(logits[row, token])
        if times or counts.in_prompt[slots[row], token]:
            logit = logit / repetition[row] if logit > 0 else logit * repetition[row]
        expected[row, token] = logit - frequency[row] * times - presence[row] * (times > 0)
    penalties = PenaltyInputs(*map(jnp.array, (repetition, presence, frequency)))
    found = sampler.penalize(logits, counts, jnp.array(slots), penalties)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[3], logits[3])  # neutral values change no bit


def test_tokens_are_counted_where_they_were_said():
    before = spoken()
    after = sampler.count(before, jnp.array([1, 3, 0]), jnp.array([2, 2, 4]))  # slot 3: padding
    expected = np.array(before.output)
    expected[1, 2] += 1
    expected[0, 4] += 1
    np.testing.assert_array_equal(after.output, expected)
    np.testing.assert_array_equal(after.in_prompt, before.in_prompt)


def test_a_slot_starts_with_what_its_request_brings():
    before = spoken()
    output, in_prompt = jnp.array([0, 0, 0, 3, 0]), jnp.array([1, 1, 0, 0, 0], bool)
    after = sampler.reset_counts(before, 1, output, in_prompt)
    np.testing.assert_array_equal(after.output[1], output)
    np.testing.assert_array_equal(after.in_prompt[1], in_prompt)
    for slot in (0, 2):
        np.testing.assert_array_equal(after.output[slot], before.output[slot])
        np.testing.assert_array_equal(after.in_prompt[slot], before.in_prompt[slot])


@pytest.mark.parametrize("k", [1, 3, 7])
def test_logprobs(k):
    logits, tokens = random_logits(6, 7), np.array([0, 1, 2, 3, 4, 6])
    expected = np.log(np.stack([softmax(row) for row in logits]))
    order = np.argsort(-expected, axis=1)
    found = sampler.logprobs(logits, tokens, k)
    np.testing.assert_array_equal(found.top_ids, order[:, :k])
    top = np.take_along_axis(expected, order[:, :k], axis=1)
    np.testing.assert_allclose(found.top, top, atol=1e-5)
    np.testing.assert_allclose(found.chosen, expected[np.arange(6), tokens], atol=1e-5)
    rank = [1 + list(row).index(token) for row, token in zip(order, tokens, strict=True)]
    assert found.chosen_rank.tolist() == rank


def test_equally_likely_tokens_share_a_rank():
    found = sampler.logprobs(jnp.array([[1.0, 2.0, 1.0, 0.0]] * 3), jnp.array([0, 2, 3]), 1)
    assert found.chosen_rank.tolist() == [2, 2, 4]
