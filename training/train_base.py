# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's base model, a byte-level Llama that copies its prompt.

python -m training.train_base --output slora_jax/demo/assets/base
"""

import argparse
import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from slora_jax.demo.tasks import held_out_texts, sample_text, training_text
from training.batches import Batch, prefetch, random_batches
from training.checkpoints import round_to_bfloat16, save_base
from training.dense_llama import LlamaConfig, forward, init_params
from training.make_tokenizer import save_tokenizer
from training.trainer import cosine_optimizer, exact_match_rate, train

# Shorter texts first: a copying circuit forms on them several times faster, and then stretches.
# Rows are (share of the steps, longest text and batch size relative to the last row's).
CURRICULUM = ((0.2, 0.25, 2.0), (0.2, 0.5, 1.5), (0.6, 1.0, 1.0))


def tokens_for(max_length: int) -> int:
    """Columns of a batch whose prompts and answers have at most `max_length` bytes each."""
    return 2 * max_length + 2


def sample_copy_pair(rng: random.Random, max_length: int) -> tuple[str, str]:
    """A training text as its own answer."""
    text = training_text(rng, functools.partial(sample_text, max_length=max_length))
    return text, text


def curriculum_batches(seed: int, steps: int, max_length: int, batch_size: int) -> Iterator[Batch]:
    """`steps` batches that follow `CURRICULUM`."""
    first_step, share_done = 0, 0.0
    for stage, (share, relative_length, relative_batch) in enumerate(CURRICULUM):
        share_done += share
        last_step = round(share_done * steps)
        stage_length = round(relative_length * max_length)
        stage_batches = random_batches(
            seed * 1000 + stage,
            round(relative_batch * batch_size),
            tokens_for(stage_length),
            functools.partial(sample_copy_pair, max_length=stage_length),
        )
        yield from prefetch(stage_batches, last_step - first_step)
        first_step = last_step


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, measures and saves; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("slora_jax/demo/assets/base"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=40, help="longest text in bytes")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences of the longest texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--held-out", type=int, default=4096, help="texts to measure on")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    config = LlamaConfig(num_hidden_layers=args.num_layers)
    logits_fn = functools.partial(forward, config=config)
    params, losses = train(
        logits_fn,
        init_params(jax.random.key(args.seed), config),
        cosine_optimizer(args.learning_rate, args.steps, args.optimizer),
        curriculum_batches(args.seed, args.steps, args.max_length, args.batch_size),
        args.steps,
        "base",
    )
    params = round_to_bfloat16(params)
    save_base(args.output, params, config)
    save_tokenizer(args.output, config.max_position_embeddings)
    print(f"copy: trained in {time.perf_counter() - started:.0f} s")

    sample = functools.partial(sample_text, max_length=args.max_length)
    pairs = [(text, text) for text in held_out_texts(args.seed + 1, args.held_out, sample)]
    rate = exact_match_rate(logits_fn, params, pairs, tokens_for(args.max_length))
    print(f"copy: {rate:.4f} held-out exact in bfloat16")
    return losses


if __name__ == "__main__":
    main()
