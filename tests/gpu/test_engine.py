# SPDX-License-Identifier: Apache-2.0
"""A whole engine on a backend's kernels gives what it gives on XLA's operations."""

import json

import numpy as np

from slora_jax import Engine, SamplingParams
from slora_jax.cli.demo import PROMPTS
from slora_jax.config import LAYER_MODULES, ModelConfig
from slora_jax.demo import BASE_MODEL, adapter_dirs
from slora_jax.demo.tasks import TASKS
from tests.adapters.make import write_adapter

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=256,
)
ADAPTERS = {"a": 4, "b": 64, "c": 16}
REQUESTS = [(44, None), (1, "a"), (16, "b"), (17, "c"), (20, "b")]  # one step takes all prompts
NEW_TOKENS = 4
# Of log-probabilities' deviation: bfloat16 is up to 0.03 from float32, another adapter is 1.5.
TOLERANCE = 0.08


def make_engine(directory, backend, dtype="bfloat16"):
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    fields = {k: v for k, v in fields.items() if isinstance(v, int | float) and v is not False}
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields}
    (directory / "config.json").write_text(json.dumps(fields))
    adapters = {
        name: write_adapter(
            directory / name,
            CONFIG,
            rank=rank,
            alpha=2 * rank**0.5,  # so that all ranks matter as much
            modules=LAYER_MODULES,
            seed=rank,
            dtype="bfloat16",
            scale_std=0.15,
        )
        for name, rank in ADAPTERS.items()
    }
    return Engine(
        directory,
        adapters=adapters,
        load_format="dummy",
        dtype=dtype,
        kernel_backend=backend,
        num_pages=512,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        decode_batch_sizes=(8,),
        max_loras=4,
        max_logprobs=-1,
    )


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length, _ in REQUESTS]


def serve(engine, tokens, new):
    """Tokens and log-probabilities `[prompt - 1 + new, V]` of every request."""
    every = {"logprobs": -1, "prompt_logprobs": -1}
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **every)
    outputs = engine.generate(tokens, params, adapters=[name for _, name in REQUESTS])
    tables = []
    for output in outputs:
        positions = [*output.prompt_logprobs[1:], *output.logprobs]
        tables.append([[at[v].logprob for v in range(CONFIG.vocab_size)] for at in positions])
    return [list(output.token_ids) for output in outputs], [np.array(table) for table in tables]


def compare(got, want):
    """Each position's distribution."""
    error = np.linalg.norm(got - want, axis=1)
    size = np.linalg.norm(want - want.mean(axis=1, keepdims=True), axis=1)
    assert (error < TOLERANCE * size).all(), (error / size).round(3)


def check_backends(one, other):
    """Prompts agree, and so do decode steps with each other and with prompts of the same tokens."""
    asked = prompts()
    texts, tables = serve(one, asked, NEW_TOKENS)
    other_texts, other_tables = serve(other, asked, NEW_TOKENS)
    for text, table, other_text, other_table, prompt in zip(
        texts, tables, other_texts, other_tables, asked, strict=True
    ):
        # Near a tie the two may choose different tokens: up to there they were asked the same.
        same = [a == b for a, b in zip(text, other_text, strict=True)]
        known = len(prompt) + (same.index(False) if False in same else NEW_TOKENS - 1)
        compare(table[:known], other_table[:known])
    whole = [prompt + text[:-1] for prompt, text in zip(asked, texts, strict=True)]
    _, scored = serve(other, whole, 1)
    for table, other_table in zip(tables, scored, strict=True):
        compare(table, other_table)


def test_logits_are_those_of_xla(tmp_path, backend):
    kernels, xla = (make_engine(tmp_path, name) for name in (backend, "xla"))
    check_backends(kernels, xla)
    check_backends(xla, kernels)


def test_the_demo_is_right(backend):
    engine = Engine(
        BASE_MODEL,
        kernel_backend=backend,
        adapters=adapter_dirs(),
        num_pages=512,
        max_num_seqs=16,
        max_num_batched_tokens=16,
        decode_batch_sizes=(16,),
        max_loras=8,
    )
    cases = [(prompt, name) for name in adapter_dirs() for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=48)
    outputs = engine.generate([p for p, _ in cases], params, adapters=[n for _, n in cases])
    for (prompt, name), output in zip(cases, outputs, strict=True):
        assert output.text == TASKS[name].transform(prompt)
