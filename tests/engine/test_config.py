# SPDX-License-Identifier: Apache-2.0
"""Options that are not given go with those that are."""

import argparse

import pytest

from server import command
from slora_jax.cli.options import engine_options
from slora_jax.config import EngineConfig


@pytest.mark.parametrize(
    ("given", "seqs", "tokens"),
    [
        ({}, 64, 512),
        ({"max_num_seqs": 4}, 4, 512),
        ({"max_num_seqs": 600}, 600, 600),
        ({"max_num_batched_tokens": 16}, 16, 16),
        ({"max_num_batched_tokens": 2048}, 64, 2048),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 8}, 8, 8),
        ({"decode_batch_sizes": (1, 128)}, 128, 512),
        ({"decode_batch_sizes": [1, 1024]}, 1024, 1024),
    ],
    ids=str,
)
def test_the_size_of_a_batch(given, seqs, tokens):
    config = EngineConfig(**given)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (seqs, tokens)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_num_seqs": 64, "max_num_batched_tokens": 8}, "max_num_batched_tokens must be at"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least"),
        ({"max_num_seqs": 4, "decode_batch_sizes": (1, 8)}, "end with max_num_seqs"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**given)


@pytest.mark.parametrize(
    ("options", "sizes", "tokens"),
    [
        ("", (8, 64), 128),
        ("--max-num-seqs 4", (4,), 128),
        ("--max-num-seqs 16", (8, 16), 128),
        ("--max-num-seqs 128", (8, 128), 128),
        ("--max-num-seqs 200", (8, 200), 200),
        ("--max-num-batched-tokens 16", (8, 16), 16),
        ("--max-num-batched-tokens 4", (4,), 4),
        ("--decode-batch-sizes 2 32", (2, 32), 128),
        ("--max-num-seqs 32 --decode-batch-sizes 32", (32,), 128),
    ],
)
def test_the_shipped_model_takes_any_size(options, sizes, tokens):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(options.split())
    command._fill_in_demo(args)
    config = EngineConfig(**{**engine_options(args), "max_loras": 16})
    assert config.decode_batch_sizes == sizes
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (sizes[-1], tokens)
