# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's LoRA adapters on the frozen base model, as it was rounded for shipping.

python -m training.train_adapters --output slora_jax/demo/assets/adapters
"""

import argparse
import functools
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from slora_jax.demo.tasks import TASKS, Task, held_out_prompts, sample_words, training_text
from training.adapter_specs import ADAPTERS, AdapterSpec
from training.batches import prefetch, random_batches
from training.checkpoints import load_base, round_to_bfloat16, save_adapter
from training.dense_llama import LlamaConfig, LoraParams, Params, forward
from training.trainer import cosine_optimizer, exact_match_rate, train

MAX_LENGTH = 24


def sequence_tokens(task: Task) -> int:
    """Columns that hold the longest prompt with its answer."""
    # Answers are longest for one long word, or for as many words as fit.
    extremes = ("x" * MAX_LENGTH, "x " * (MAX_LENGTH // 2))
    return MAX_LENGTH + max(len(task.transform(text)) for text in extremes) + 2


def train_adapter(
    spec: AdapterSpec, base: Params, config: LlamaConfig, args: argparse.Namespace
) -> tuple[LoraParams, list[float]]:
    """Trains one adapter in float32.

    Returns:
        The adapter rounded to bfloat16, and the loss of every step.
    """
    task = TASKS[spec.task]
    steps = args.steps or spec.steps
    base_f32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
    scales = spec.scales(config)

    def sample_pair(rng: random.Random) -> tuple[str, str]:
        text = training_text(rng, functools.partial(sample_words, max_length=MAX_LENGTH))
        return text, task.transform(text)

    lora, losses = train(
        lambda weights, ids: forward(base_f32, ids, config, weights, scales),
        spec.init_lora(jax.random.key(args.seed), config),
        cosine_optimizer(args.learning_rate, steps, args.optimizer),
        prefetch(
            random_batches(args.seed, args.batch_size, sequence_tokens(task), sample_pair), steps
        ),
        steps,
        spec.task,
    )
    return round_to_bfloat16(lora), losses


def held_out_accuracy(
    spec: AdapterSpec, base: Params, config: LlamaConfig, lora: LoraParams, seed: int, n: int
) -> float:
    """Share of `n` held-out prompts answered exactly, with bfloat16 weights and activations."""
    task = TASKS[spec.task]
    scales = spec.scales(config)
    return exact_match_rate(
        lambda weights, ids: forward(base, ids, config, weights, scales),
        lora,
        [(prompt, task.transform(prompt)) for prompt in held_out_prompts(seed, n)],
        sequence_tokens(task),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults reproduce the shipped adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("slora_jax/demo/assets/base"))
    parser.add_argument("--output", type=Path, default=Path("slora_jax/demo/assets/adapters"))
    parser.add_argument("--tasks", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--steps", type=int, help="instead of each adapter's own number")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=1024, help="prompts to measure on")
    parser.add_argument(
        "--base-name", default="slora-jax/demo-base", help="name kept in PEFT config"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Trains, saves and measures; returns the losses by adapter."""
    args = parse_args(argv)
    base, config = load_base(args.base)
    all_losses = {}
    for name in args.tasks:
        started = time.perf_counter()
        spec = ADAPTERS[name]
        lora, all_losses[name] = train_adapter(spec, base, config, args)
        save_adapter(args.output / name, lora, spec.peft_config(args.base_name))
        elapsed = time.perf_counter() - started
        rate = held_out_accuracy(spec, base, config, lora, args.seed + 1, args.held_out)
        print(f"{name}: {rate:.4f} held-out exact in bfloat16, trained in {elapsed:.0f} s")
    return all_losses


if __name__ == "__main__":
    main()
