# SPDX-License-Identifier: Apache-2.0
"""The optimisation loop and the exact-match measure shared by base and adapters."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.batches import Batch, encode_pairs

# Logits [B, T, V] of trainable weights on token ids [B, T].
LogitsFn = Callable[[Any, jax.Array], jax.Array]


def answer_loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross-entropy over the answer tokens."""
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
    return jnp.sum(loss_BT * batch.answer_mask_BT) / jnp.sum(batch.answer_mask_BT)


def exact_matches(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Whether each sequence's whole answer is the model's first choice at every token, [B].

    Greedy decoding writes the reference answer exactly when this holds: as long as it has been
    right, its context is the teacher-forced one.
    """
    right_BT = jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT
    return jnp.all(right_BT | ~batch.answer_mask_BT, axis=-1)


def loss_and_exact_rate(
    logits_fn: LogitsFn, weights: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The loss to differentiate, and the share of exact matches beside it."""
    logits_BTV = logits_fn(weights, jnp.asarray(batch.inputs_BT))
    return answer_loss(logits_BTV, batch), jnp.mean(exact_matches(logits_BTV, batch))


def cosine_optimizer(learning_rate: float, steps: int, name: str) -> optax.GradientTransformation:
    """AdamW or Muon under linear warm-up, cosine decay and gradient clipping."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, max(1, steps // 10)), steps, 0.01 * learning_rate
    )
    if name == "muon":
        rule = optax.contrib.muon(schedule, adam_b2=0.98)
    else:
        rule = optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def make_progress() -> Progress:
    """A progress bar with the running loss and exact-match share."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f} exact {task.fields[exact]:.3f}"),
    )


def train(
    logits_fn: LogitsFn,
    trainable: Any,
    optimizer: optax.GradientTransformation,
    batches: Iterator[Batch],
    steps: int,
    description: str,
) -> tuple[Any, list[float]]:
    """Runs `optimizer` over `batches`.

    Args:
        logits_fn: forward pass.
        trainable: pytree of weights to optimise.
        optimizer: update rule; its schedule should span `steps`.
        batches: one batch per step; a new shape costs a compilation.
        steps: length of the progress bar.
        description: label of the progress bar.

    Returns:
        The trained pytree and the loss of every step.
    """
    loss_and_grad = jax.value_and_grad(
        functools.partial(loss_and_exact_rate, logits_fn), has_aux=True
    )

    @jax.jit
    def update(weights: Any, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array, jax.Array]:
        (loss, exact), grads = loss_and_grad(weights, batch)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss, exact

    state = optimizer.init(trainable)
    losses = []
    with make_progress() as progress:
        bar = progress.add_task(description, total=steps, loss=float("nan"), exact=0.0)
        for batch in batches:
            trainable, state, loss, exact = update(trainable, state, batch)
            losses.append(float(loss))
            progress.update(bar, advance=1, loss=losses[-1], exact=float(exact))
    return trainable, losses


def exact_match_rate(
    logits_fn: LogitsFn, weights: Any, pairs: list[tuple[str, str]], tokens: int
) -> float:
    """Share of (prompt, answer) pairs that greedy decoding answers exactly."""
    batch_size = 128
    count_matches = jax.jit(
        lambda weights, batch: jnp.sum(
            exact_matches(logits_fn(weights, jnp.asarray(batch.inputs_BT)), batch)
        )
    )
    matches = 0
    for start in range(0, len(pairs), batch_size):
        batch = encode_pairs(pairs[start : start + batch_size], tokens)
        matches += int(count_matches(weights, batch))
    return matches / len(pairs)
