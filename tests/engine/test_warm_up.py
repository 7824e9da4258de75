# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no request waits for a compiler, whatever adapter it asks for."""

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.config import LAYER_MODULES
from slora_jax.demo import BASE_MODEL
from slora_jax.hf_config import read_model_config
from tests.adapters.make import write_adapter
from tests.sharding.models import write_model

LORA_MODES = ("none", "layers", "all")
CONFIG = replace(read_model_config(BASE_MODEL), num_hidden_layers=1)  # compiles sooner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("warm-up") / "model", CONFIG)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    modules = {"attention": ("q_proj", "v_proj"), "all": LAYER_MODULES, "head": ("lm_head",)}
    return {
        name: write_adapter(root / name, CONFIG, seed=seed, rank=2, modules=names)
        for seed, (name, names) in enumerate(modules.items())
    }


@pytest.fixture(scope="module")
def engine(model: Path, adapters: dict[str, Path]) -> Engine:
    engine = make_engine(model, adapters, num_pages=300, max_model_len=64)
    engine.warm_up()
    return engine


def make_engine(
    model: Path, adapters: dict[str, Path], *, num_pages: int, max_model_len: int, devices: int = 1
) -> Engine:
    """With few programs to compile."""
    return Engine(
        model,
        adapters=adapters,
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        decode_batch_sizes=(8,),
        max_loras=4,
        max_lora_rank=4,
        tensor_parallel_size=devices,
    )


def compiled(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What JAX says that it compiles."""
    return [m for m in caplog.messages if m.startswith(("Compiling", "Finished XLA compilation"))]


def test_compilations_are_noticed(caplog):
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        jax.jit(lambda x: x + len(caplog.messages))(np.arange(3))
    assert compiled(caplog)


def test_nothing_is_counted(engine):
    stats = engine.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (0, 0, 0)
    assert stats.load_seconds == ()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    engine.check()


@pytest.mark.parametrize("requests", [1, 2, 3, 8])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_no_request_waits_for_the_compiler(engine, adapters, caplog, requests, prompt):
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=4, ignore_eos=True)
    names = [None, *adapters]
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for name in names:
            engine.generate([[7] * prompt] * requests, greedy, adapters=name)
        mixed = [names[number % len(names)] for number in range(requests)]
        engine.generate([[7] * prompt] * requests, greedy, adapters=mixed)
        engine.generate([[7] * prompt] * requests, sampled)
    assert compiled(caplog) == []


def test_programs_are_as_few_as_buckets(engine, adapters, caplog):
    """However long a server runs and whatever it is asked: their maps and memory have a limit."""
    rng = np.random.default_rng(0)
    names = [None, *adapters]

    def anything() -> SamplingParams:
        optional = {
            "logprobs": int(rng.integers(21)),
            "prompt_logprobs": int(rng.integers(21)),
            "repetition_penalty": rng.uniform(0.5, 2),
            "min_tokens": int(rng.integers(1, 4)),
            "top_k": int(rng.integers(1, 300)),
            "top_p": rng.uniform(0.1, 1),
            "seed": int(rng.integers(1000)),
        }
        chosen = {name: value for name, value in optional.items() if rng.random() < 0.3}
        return SamplingParams(temperature=rng.choice([0, 0.5, 2]), max_tokens=4, **chosen)

    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for _ in range(60):
            prompts = [[7] * int(rng.integers(1, 60)) for _ in range(rng.integers(1, 9))]
            asked = [rng.choice(names) for _ in prompts]
            engine.generate(prompts, [anything() for _ in prompts], adapters=asked)
    found = [re.search(r"^Finished XLA compilation of jit\((.*)\)", m) for m in caplog.messages]
    programs = Counter(match[1] for match in found if match)
    assert programs["penalize"] == 1  # as one of those that the warm-up leaves out: they are seen
    kinds_of_k = 3  # 1, 5 and 20
    most = {"logprobs": kinds_of_k, "prompt_logprobs": kinds_of_k * len(LORA_MODES)}
    assert all(count <= most.get(name, 1) for name, count in programs.items()), programs
    assert "model_step" not in programs


@pytest.mark.parametrize("pinned", [False, True])
def test_little_room(model, adapters, pinned):
    """What does not fit is not tried."""
    engine = make_engine(model, {"all": adapters["all"]}, num_pages=15, max_model_len=256)
    if pinned:
        engine.pin_adapter("all")
    room = engine.adapters.room_for(None)
    assert room * engine.options.page_size < 256, "the pool is too large for this test"
    engine.warm_up()
    engine.check()


def test_an_adapter_of_known_modules_compiles_nothing(engine, caplog, tmp_path):
    """As those that are loaded while a server runs."""
    write_adapter(tmp_path / "new", CONFIG, seed=9, rank=3, modules=("q_proj", "down_proj"))
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        engine.load_adapter("new", tmp_path / "new")
        engine.generate([[7] * 5], SamplingParams(temperature=0, max_tokens=4), adapters="new")
    assert compiled(caplog) == []


def test_on_two_devices(model, adapters, caplog):
    engine = make_engine(
        model, {"all": adapters["all"]}, num_pages=100, max_model_len=64, devices=2
    )
    engine.warm_up()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.generate([[7] * 20] * 3, greedy, adapters=["all", None, None])
    assert compiled(caplog) == []
