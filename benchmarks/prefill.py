# SPDX-License-Identifier: Apache-2.0
"""How fast prompts are computed, with and without adapters.

python -m benchmarks.prefill --shape llama-2-7b --prompt 4096 --adapters 0,1 \
    --results benchmarks/results/prefill.jsonl

Prompts come one after another, each for one token of output, so that all steps are full of prompts.
One has a token less than `prompt`, which is the model's length and a step's: its output needs room.
`us` is the time of such a step, `limit_us` what its FLOPs take at the matmul's best in the same
run; `ratio`, their quotient, is the share of the matmul's peak.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine_load import PAGE_SIZE, Compilations
from benchmarks.measure import Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.shapes import MODELS
from benchmarks.shared_adapters import load_shared, name_of
from benchmarks.synthetic import adapter_elems, adapter_pages, write_model
from benchmarks.trace import counts
from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax import Engine, SamplingParams
from slora_jax.config import LAYER_MODULES, ModelConfig


def prompt_work(config: ModelConfig, prompt: int, rank: int, item: int) -> Work:
    """What a prompt cannot avoid: layers for all tokens, the head for the last, causal attention.

    Args:
        config: the model.
        prompt: tokens.
        rank: of its adapter; 0: none.
        item: bytes of an element.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    of_layer = sum(math.prod(config.projection_shape(module)) for module in LAYER_MODULES)
    head = math.prod(config.projection_shape("lm_head"))
    lora = adapter_elems(config, rank)
    attention = 4 * layers * heads * prompt * (prompt + 1) // 2
    flops = 2 * prompt * (layers * of_layer + lora) + 2 * head + attention
    return Work((layers * of_layer + head + lora) * item, flops)


def run(engine: Engine, prompt: int, requests: int, adapters: int) -> float:
    """Seconds of a prompt, when there is always a next one."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, engine.config.vocab_size, (requests, prompt)).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    names = itertools.cycle([name_of(n) for n in range(adapters)] or [None])
    for one, name in zip(prompts, names, strict=False):
        engine.add_request(one, params, adapter=name)
    ends = []
    while engine.has_unfinished:
        ends += [time.perf_counter()] * sum(output.finished for output in engine.step())
    # The first step's time is not known: it was dispatched before the clock was read.
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, required=True)
    parser.add_argument(
        "--prompt", type=int, default=4096, help="tokens of a step; a prompt has one less"
    )
    parser.add_argument("--requests", type=int, default=16, help="prompts of a run")
    parser.add_argument(
        "--adapters", type=counts, default=[0, 1], metavar="N,…", help="a row each; 0: base only"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row")
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")
    args = parser.parse_args(argv)
    prompt = args.prompt - 1
    config, most = MODELS[args.shape], max(args.adapters)
    recorder = Recorder(args.results)
    ceilings = recorder.ceilings(small=args.shape == "tiny", beside="prefill")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        layout = PageLayout(config.num_key_value_heads, config.head_dim, PAGE_SIZE)
        pages = 3 * ceil_div(args.prompt + 1, PAGE_SIZE)
        pages += (most + 1) * adapter_pages(config, layout, args.rank)
        say("starting the engine")
        engine = Engine(
            write_model(directory / "model", config),
            load_format="dummy",
            page_size=PAGE_SIZE,
            num_pages=pages + 1,
            max_model_len=args.prompt,
            max_num_seqs=8,
            max_num_batched_tokens=args.prompt,
            decode_batch_sizes=(8,),
            max_loras=max(most, 1) + 1,
            max_lora_rank=args.rank,
            admission_watermark=0.0,
        )
        load_shared(engine, directory / "adapters", count=most, ranks=(args.rank,))
        item = jnp.dtype(engine.options.dtype).itemsize
        for adapters in args.adapters:
            with Compilations():
                run(engine, prompt, 3, adapters)
            seconds = []
            for _ in range(args.repetitions):
                seconds.append(run(engine, prompt, args.requests, adapters))
                say(f"adapters {adapters}: {1e3 * seconds[-1]:.2f} ms a prompt")
            work = prompt_work(config, prompt, args.rank if adapters else 0, item)
            timing = Timing.of([1e6 * one for one in seconds])
            recorder.add(
                "prefill",
                timing,
                work,
                1e6 * work.flops / ceilings.flops,
                shape=args.shape,
                dtype=engine.options.dtype,
                backend=engine.options.kernel_backend,
                prompt=args.prompt,
                adapters=adapters,
                rank=args.rank,
                tokens_per_s=round(1e6 * prompt / timing.us, 1),
                tflops=round(1e-6 * work.flops / timing.us, 1),
                spread=round(statistics.stdev(seconds) / statistics.mean(seconds), 4),
            )
        jax.block_until_ready(engine.runner.state)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
