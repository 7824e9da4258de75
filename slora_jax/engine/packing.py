# SPDX-License-Identifier: Apache-2.0
"""Step plans as the arrays that the compiled programs take, padded to their buckets."""

from collections.abc import Sequence

import numpy as np

from slora_jax.config import EngineConfig
from slora_jax.core import RowPlan, StepPlan
from slora_jax.engine.sampler import PenaltyInputs, SamplingInputs
from slora_jax.model.inputs import Bucket, StepInputs

_LEAST_POSITIVE = np.float32(1e-30)
MOST_BANNED = 16  # token ids that `min_tokens` can hold back, a row


class Buckets:
    """The shapes that steps are padded to.

    Decode steps are padded to one of `decode_batch_sizes`, by default powers of two. Steps with
    prompts have one of three sizes, and always the most rows.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loras: int,
        page_size: int,
        decode_batch_sizes: tuple[int, ...] | None = None,
    ):
        self._max_loras = max_loras
        self._page_size = page_size
        self._rows = decode_batch_sizes or _powers_of_two(1, max_num_seqs)
        few = max(max_num_batched_tokens // 8, 16)
        self._tokens = [n for n in _powers_of_two(few, max_num_batched_tokens) if n >= few]
        self._tokens = sorted(
            {self._tokens[0], self._tokens[len(self._tokens) // 2], self._tokens[-1]}
        )

    def of(self, plan: StepPlan) -> Bucket:
        """The smallest bucket that holds a plan."""
        if plan.decode_only:
            rows = next(n for n in self._rows if n >= len(plan.rows))
            return Bucket(rows, rows, min(rows, self._max_loras), rows)
        return self._mixed(next(n for n in self._tokens if n >= plan.num_tokens))

    @property
    def decode_sizes(self) -> list[int]:
        """Rows of decode steps, ascending."""
        return list(self._rows)

    @property
    def mixed_sizes(self) -> list[int]:
        """Tokens of steps with prompts, ascending."""
        return list(self._tokens)

    @property
    def largest(self) -> Bucket:
        return self._mixed(self._tokens[-1])

    def _mixed(self, tokens: int) -> Bucket:
        rows = self._rows[-1]
        # A row of n tokens enters at most n // page_size + 1 new pages.
        segments = min(rows, self._max_loras)
        return Bucket(tokens, rows, segments, tokens // self._page_size + rows)


def buckets_of(options: EngineConfig) -> Buckets:
    """The shapes that an engine compiles."""
    return Buckets(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_loras=options.max_loras,
        page_size=options.page_size,
        decode_batch_sizes=options.decode_batch_sizes,
    )


def _powers_of_two(least: int, most: int) -> list[int]:
    """Powers of two from `least` on, and `most` as the last."""
    sizes = [least]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return [*sizes, most] if most > sizes[-1] else sizes


def padded(values: Sequence[int], size: int, fill: int) -> np.ndarray:
    return np.asarray([*values, *[fill] * (size - len(values))], np.int32)


def pack_step(plan: StepPlan, bucket: Bucket, max_num_seqs: int) -> np.ndarray:
    """The plan as `StepInputs`, in one array."""
    rows = plan.rows
    lengths = [len(row.tokens) for row in rows]
    segments: list[list[int]] = []  # slot, tokens, rows
    for row, length in zip(rows, lengths, strict=True):
        if row.adapter_slot is None:
            break
        if not segments or segments[-1][0] != row.adapter_slot:
            segments.append([row.adapter_slot, 0, 0])
        segments[-1][1] += length
        segments[-1][2] += 1
    fields = {
        "tokens": [token for row in rows for token in row.tokens],
        "positions": np.concatenate(
            [row.start + np.arange(n) for row, n in zip(rows, lengths, strict=True)]
        ),
        "row": np.repeat(np.arange(len(rows)), lengths),
        "slot": [row.slot for row in rows],
        "query_start": np.cumsum([0, *lengths[:-1]]),
        "query_len": lengths,
        "context_len": [row.start + n for row, n in zip(rows, lengths, strict=True)],
        "segment_slot": [segment[0] for segment in segments],
        "segment_tokens": [segment[1] for segment in segments],
        "segment_rows": [segment[2] for segment in segments],
        "update_slot": [update[0] for update in plan.page_updates],
        "update_column": [update[1] for update in plan.page_updates],
        "update_page": [update[2] for update in plan.page_updates],
    }
    unused = {"slot": max_num_seqs, "update_slot": max_num_seqs, "row": bucket.rows}
    return StepInputs.pack(fields, unused, bucket)


def _column(rows: Sequence[RowPlan], bucket: int, name: str, fill: float) -> np.ndarray:
    values = [getattr(row.request.params, name) for row in rows]
    return np.asarray([*values, *[fill] * (bucket - len(rows))], np.float32)


def _positive(rows: Sequence[RowPlan], bucket: int, name: str) -> np.ndarray:
    """A column without what float32 takes for 0, or by which logits overflow; 1 where unused."""
    return np.maximum(_column(rows, bucket, name, 1.0), _LEAST_POSITIVE)


def sampling(rows: Sequence[RowPlan], bucket: int, vocab: int) -> SamplingInputs:
    top_k = [row.request.params.top_k for row in rows]
    return SamplingInputs(
        temperature=_column(rows, bucket, "temperature", 0.0),
        top_k=padded([k if 0 < k < vocab else vocab for k in top_k], bucket, vocab),
        top_p=_positive(rows, bucket, "top_p"),
        min_p=_column(rows, bucket, "min_p", 0.0),
        seed=padded([row.request.seed for row in rows], bucket, 0),
        position=padded([row.position for row in rows], bucket, 0),
    )


def penalties(rows: Sequence[RowPlan], bucket: int) -> PenaltyInputs:
    return PenaltyInputs(
        repetition=_positive(rows, bucket, "repetition_penalty"),
        presence=_column(rows, bucket, "presence_penalty", 0.0),
        frequency=_column(rows, bucket, "frequency_penalty", 0.0),
    )


def banned_ids(row: RowPlan) -> frozenset[int]:
    """Token ids that would stop a row that has not reached its `min_tokens`."""
    early = row.samples and row.position < row.request.params.min_tokens
    return row.request.stop_ids if early else frozenset()
