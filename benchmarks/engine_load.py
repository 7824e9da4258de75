# SPDX-License-Identifier: Apache-2.0
"""A load of requests on an engine, and how long its decode steps take."""

import itertools
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from benchmarks.record import say
from benchmarks.shared_adapters import name_of
from benchmarks.synthetic import MODULES, adapter_pages, write_model
from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax import Engine, SamplingParams
from slora_jax.config import ModelConfig

PAGE_SIZE = 16
STEP_TOKENS = 512  # of a step with prompts, about
TRACED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that come at once.

    Attributes:
        batch: how many.
        prompt, output: tokens of each.
        adapters: distinct adapters among them; 0: the base model only.
        ranks: adapter i has `ranks[i % len(ranks)]`.
        modules: of the layers, that the adapters adapt.
    """

    batch: int
    prompt: int
    output: int
    adapters: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...] = MODULES

    def rank_of(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a load took, in seconds.

    Attributes:
        steps: from step to step, while all requests decoded.
        context: tokens of a request in these steps, on average.
        first_token: from the beginning to each request's first token.
    """

    steps: list[float]
    context: float
    first_token: list[float]


def run_load(engine: Engine, load: Load, trace: Path | None = None) -> Run:
    """Serves a load until its first request ends; with `trace`, some steps are profiled."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, engine.config.vocab_size, (load.batch, load.prompt)).tolist()
    params = SamplingParams(temperature=0, max_tokens=load.output, ignore_eos=True)
    start = previous = time.perf_counter()
    names = itertools.cycle([name_of(n) for n in range(load.adapters)] or [None])
    ids = [
        engine.add_request(prompt, params, adapter=name)
        for prompt, name in zip(prompts, names, strict=False)
    ]
    first_token, steps, contexts = {}, [], []
    was_full, tracing = False, False
    while True:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            first_token.setdefault(output.request_id, now - start)
            assert output.finish_reason in (None, "length"), output.stop_reason
        # A request's second token is the first that a decode step has made.
        full = len(outputs) == load.batch and all(len(o.token_ids) > 1 for o in outputs)
        if full and was_full:
            steps.append(now - previous)
            contexts.append(statistics.mean(load.prompt + len(o.token_ids) - 1 for o in outputs))
        previous, was_full = now, full
        if trace is not None and tracing != (0 < len(steps) <= TRACED_STEPS):
            tracing = not tracing
            if tracing:
                jax.profiler.start_trace(str(trace))
            else:
                jax.profiler.stop_trace()
        if any(output.finished for output in outputs):
            break
    if tracing:
        jax.profiler.stop_trace()
    for request_id in ids:
        engine.abort(request_id)
    while engine.has_unfinished:
        engine.step()
    assert steps, "the requests never decoded all together: ask for more output"
    return Run(steps, statistics.mean(contexts), list(first_token.values()))


def step_tokens(batch: int, prompt: int, output: int) -> int:
    """Tokens of a step with prompts: about `STEP_TOKENS`, so that all such steps are one program.

    More where the first request would otherwise have a quarter of its output before the last one
    has its prompt. The engine has smaller programs for a last chunk; with this number it is a
    large one.
    """

    def last_step(most: int) -> int:
        computed = step = 0
        while computed < batch * prompt:
            decoding = computed // prompt
            chunk = min(most - decoding, batch * prompt - computed)
            computed, step = computed + chunk, decoding + chunk
        return step

    quarter = ceil_div(4 * batch * prompt, output)
    least = max(min(max(STEP_TOKENS, quarter), batch * prompt), 2 * batch)
    candidates = range(least, 2 * least, 8)
    return next((most for most in candidates if last_step(most) > most // 2), least)


def start_engine(directory: Path, config: ModelConfig, load: Load) -> Engine:
    """An engine with room for a load, and no more programs than it needs."""
    layout = PageLayout(config.num_key_value_heads, config.head_dim, PAGE_SIZE)
    length = load.prompt + load.output
    pages = load.batch * ceil_div(length, PAGE_SIZE)
    adapters = map(load.rank_of, range(load.adapters))
    pages += sum(adapter_pages(config, layout, rank, load.modules) for rank in adapters)
    return Engine(
        write_model(directory / "model", config),
        load_format="dummy",
        page_size=PAGE_SIZE,
        num_pages=pages + 1,
        max_model_len=length,
        max_num_seqs=load.batch,
        max_num_batched_tokens=step_tokens(load.batch, load.prompt, load.output),
        decode_batch_sizes=sorted({1, load.batch}),
        max_loras=max(load.adapters, 1),
        max_lora_rank=max(load.ranks),
    )


class Compilations(logging.Handler):
    """Adds up what the engine says it took to compile its programs, and passes it on."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
        if record.msg.startswith("compiled ") and isinstance(record.args, tuple):
            self.seconds += float(str(record.args[-1]))

    def __enter__(self) -> "Compilations":
        self._logger = logging.getLogger("slora_jax.engine")
        self._level = self._logger.level
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
