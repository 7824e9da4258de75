# SPDX-License-Identifier: Apache-2.0
"""A step plan as plain data: all that a device needs, and nothing that lives elsewhere.

Where several processes drive the devices of one mesh, one of them plans, and all carry out the same
commands in the same order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from slora_jax.config import EngineConfig
from slora_jax.core import Request, StepPlan
from slora_jax.engine.packing import (
    MOST_BANNED,
    Buckets,
    banned_ids,
    pack_step,
    padded,
    penalties,
    sampling,
)
from slora_jax.engine.sampler import PenaltyInputs, SamplingInputs
from slora_jax.model.inputs import Bucket
from slora_jax.model.llama import LoraMode


class Counts(NamedTuple):
    """What a request brings when it gets its slot, for its penalties."""

    slot: int
    output: Int[np.ndarray, " n"]  # token ids, in any order
    prompt: Int[np.ndarray, " m"]


class Choice(NamedTuple):
    """How the rows' next tokens are chosen; None where no row asks for it."""

    slot: Int[np.ndarray, " B"]  # that keeps the token; past the last for rows that choose none
    penalties: PenaltyInputs | None
    banned: Int[np.ndarray, "B n"] | None
    sampling: SamplingInputs | None  # None: all are greedy
    logprobs: int | None


class PromptLogprobs(NamedTuple):
    """Log-probabilities of given tokens."""

    targets: Int[np.ndarray, " T"]  # after each of the step's tokens
    k: int


class StepCommand(NamedTuple):
    """One step: the model, the choice of tokens; its adapters have been installed."""

    bucket: Bucket
    decode: bool
    lora_mode: LoraMode
    adapted: frozenset[str]  # modules that LoRA is compiled for
    packed: Int[np.ndarray, " n"]  # `StepInputs`
    counts: tuple[Counts, ...]
    choice: Choice
    prompt_logprobs: PromptLogprobs | None


def step_command(
    plan: StepPlan,
    buckets: Buckets,
    options: EngineConfig,
    vocab_size: int,
    outer_slots: set[int],
    adapted: frozenset[str],
) -> StepCommand:
    """The command that carries out a plan.

    Args:
        plan: the step.
        buckets: the engine's.
        options: the engine's.
        vocab_size: V.
        outer_slots: adapter slots with `embed_tokens` or `lm_head`.
        adapted: modules of layers that some adapter has.
    """
    bucket = buckets.of(plan)
    slots = {row.adapter_slot for row in plan.rows} - {None}
    lora_mode: LoraMode = "none" if not slots else "all" if slots & outer_slots else "layers"
    return StepCommand(
        bucket,
        plan.decode_only,
        lora_mode,
        adapted if slots else frozenset(),
        pack_step(plan, bucket, options.max_num_seqs),
        tuple(_counts(one) for one in plan.started if one.params.penalized),
        _choice(plan, bucket.rows, options.max_num_seqs, vocab_size),
        _prompt_logprobs(plan, bucket.tokens, vocab_size),
    )


def _counts(request: Request) -> Counts:
    assert request.slot is not None
    output, prompt = np.array(request.output, np.int32), np.array(request.prompt, np.int32)
    return Counts(request.slot, output, prompt)


def _choice(plan: StepPlan, bucket: int, unused_slot: int, vocab_size: int) -> Choice:
    rows = plan.rows
    choosing = [row for row in rows if row.samples]
    slots = [row.slot if row.samples else unused_slot for row in rows]
    penalized = any(row.request.params.penalized for row in choosing)
    banned = [banned_ids(row) for row in rows]
    ids = [padded(sorted(one), MOST_BANNED, vocab_size) for one in banned]
    filler = np.full((bucket - len(rows), MOST_BANNED), vocab_size, np.int32)
    return Choice(
        padded(slots, bucket, unused_slot),
        penalties(rows, bucket) if penalized else None,
        np.concatenate([np.stack(ids), filler]) if any(banned) else None,
        None
        if all(row.request.params.greedy for row in choosing)
        else sampling(rows, bucket, vocab_size),
        _top_k([row.request.params.logprobs for row in choosing], vocab_size),
    )


def _prompt_logprobs(plan: StepPlan, bucket: int, vocab_size: int) -> PromptLogprobs | None:
    asked = [
        row.request.params.prompt_logprobs
        for row in plan.rows
        if row.start < len(row.request.prompt) - 1
    ]
    k = _top_k(asked, vocab_size)
    if k is None:
        return None
    targets: list[int] = []
    for row in plan.rows:
        following = row.request.prompt[row.start + 1 : row.start + 1 + len(row.tokens)]
        targets += following + [0] * (len(row.tokens) - len(following))
    return PromptLogprobs(padded(targets, bucket, fill=0), k)


def _top_k(asked: Sequence[int | None], vocab_size: int) -> int | None:
    """A k that covers all that was asked for, coarse so that few variants are compiled."""
    wanted = [vocab_size if k == -1 else k for k in asked if k is not None]
    if not wanted:
        return None
    most = max(wanted)
    return next((k for k in (1, 5, 20) if most <= k <= vocab_size), vocab_size)
