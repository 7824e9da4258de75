# SPDX-License-Identifier: Apache-2.0
"""Batches of prompt/answer token sequences, made in a background thread.

Every sequence is `<|begin|> prompt <|sep|> answer <|end|>`; the loss counts the answer and
`<|end|>` only.
"""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

# Ids 0 to 255 are the bytes themselves.
BEGIN, SEP, END, PAD = 256, 257, 258, 259
SPECIAL_TOKENS = {"<|begin|>": BEGIN, "<|sep|>": SEP, "<|end|>": END, "<|pad|>": PAD}


class Batch(NamedTuple):
    """Teacher-forcing inputs.

    Attributes:
        inputs_BT: int32 token ids.
        targets_BT: int32 ids, each the successor of the input at its place.
        answer_mask_BT: bool, True where the target belongs to the answer.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    answer_mask_BT: np.ndarray


def encode_pairs(pairs: list[tuple[str, str]], tokens: int) -> Batch:
    """Encodes (prompt, answer) pairs, right-padded to `tokens` columns."""
    ids = np.full((len(pairs), tokens + 1), PAD, np.int32)
    answer_mask_BT = np.zeros((len(pairs), tokens), bool)
    for row, (prompt, answer) in enumerate(pairs):
        prompt_bytes, answer_bytes = prompt.encode(), answer.encode()
        sequence = [BEGIN, *prompt_bytes, SEP, *answer_bytes, END]
        ids[row, : len(sequence)] = sequence
        answer_mask_BT[row, len(prompt_bytes) + 1 : len(sequence) - 1] = True
    return Batch(ids[:, :-1], ids[:, 1:], answer_mask_BT)


def random_batches(
    seed: int,
    batch_size: int,
    tokens: int,
    sample_pair: Callable[[random.Random], tuple[str, str]],
) -> Iterator[Batch]:
    """Endless batches of freshly sampled pairs."""
    rng = random.Random(seed)
    while True:
        yield encode_pairs([sample_pair(rng) for _ in range(batch_size)], tokens)


def prefetch(batches: Iterator[Batch], count: int, depth: int = 4) -> Iterator[Batch]:
    """Yields `count` batches, prepared ahead of their use by a background thread."""
    # One worker, as two threads must not advance the same generator.
    with ThreadPoolExecutor(max_workers=1) as producer:
        futures = (producer.submit(next, batches) for _ in range(count))
        pending = deque(itertools.islice(futures, depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(itertools.islice(futures, 1))
            yield batch
