# SPDX-License-Identifier: Apache-2.0
"""Exactness to Hugging Face Transformers + PEFT, in float32, over the full vocabulary.

All requests of a case run in one mixed batch: several adapters, base rows, prompts longer than a
chunk, and preempted requests.
"""

import importlib.util
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from slora_jax import Engine, RequestOutput, SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/reference.json"))
CHUNK = 16  # tokens of a step: prompts of up to 45 tokens take several
CLEAR = 1e-3  # where the reference's two best tokens are closer, either may be chosen


def make_engine(case: Path, budget: int = CHUNK) -> Engine:
    return Engine(
        case / "model",
        adapters={path.name: path for path in sorted((case / "adapters").iterdir())},
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        decode_batch_sizes=(8,),
        max_logprobs=-1,
    )


def serve(
    engine: Engine, requests: list[dict], preempt_every: int | None = None
) -> list[RequestOutput]:
    """All requests in one batch; the engine's books are checked after every step.

    Every `preempt_every` steps the request admitted last is preempted, as if pages had run out.
    """
    ids = []
    for request in requests:
        params = SamplingParams(
            temperature=0,
            max_tokens=len(request["tokens"]),
            ignore_eos=True,
            logprobs=-1,
            prompt_logprobs=-1,
        )
        ids.append(engine.add_request(request["prompt"], params, adapter=request["adapter"]))
    finished = {}
    for step in itertools.count(1):
        for output in engine.step():
            finished[output.request_id] = output
        running = engine.scheduler.running
        if preempt_every and step % preempt_every == 0 and len(running) > 1:
            engine.scheduler.preempt(running[-1])
        engine.check()
        if not engine.has_unfinished:
            break
    return [finished[i] for i in ids]


def table(output: RequestOutput, vocab: int) -> np.ndarray:
    """Log-probabilities `[P + N - 1, V]`: row t is the distribution of token t + 1."""
    positions = [*output.prompt_logprobs[1:], *output.logprobs]
    return np.array([[position[v].logprob for v in range(vocab)] for position in positions])


# Preempted requests are prefilled in several chunks as well: the other ways are long.
@pytest.mark.parametrize(
    ("name", "budget", "preempt_every"),
    [(name, CHUNK, 3) for name in CASES]
    + [pytest.param(name, CHUNK, None, marks=pytest.mark.long) for name in CASES]
    + [pytest.param(name, 100, None, marks=pytest.mark.long) for name in CASES],
)
def test_golden(name, budget, preempt_every):
    case = GOLDEN / name
    requests = json.loads((case / "reference.json").read_text())["requests"]
    reference = load_file(case / "reference.safetensors")
    assert {r["adapter"] for r in requests} > {None}
    with jax.default_matmul_precision("highest"):
        engine = make_engine(case, budget)
        outputs = serve(engine, requests, preempt_every)
    assert (engine.scheduler.num_preemptions > 0) == (preempt_every is not None)
    assert max(len(r["prompt"]) for r in requests) > CHUNK
    for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        want = reference[f"logprobs.{index}"]
        np.testing.assert_allclose(table(output, want.shape[1]), want, atol=2e-4, rtol=0)
        for got, token, gap in zip(
            output.token_ids, request["tokens"], request["gaps"], strict=True
        ):
            assert got == token or gap < CLEAR


def live_reference():
    """The script that made the golden files, where what it needs is installed."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference


@pytest.mark.parametrize("name", CASES)
def test_live(name):
    """The same comparison against the installed Transformers and PEFT, with other prompts."""
    reference = live_reference()
    case = GOLDEN / name
    requests = json.loads((case / "reference.json").read_text())["requests"]
    wanted = []
    for request in requests:
        request["prompt"] = request["prompt"][::-1]
        adapter = request["adapter"] and case / "adapters" / request["adapter"]
        tokens, logprobs = reference(case / "model", adapter, request["prompt"], 6)
        request["tokens"] = [int(token) for token in tokens]
        wanted.append(np.asarray(logprobs))
    with jax.default_matmul_precision("highest"):
        outputs = serve(make_engine(case), requests)
    for request, output, want in zip(requests, outputs, wanted, strict=True):
        np.testing.assert_allclose(table(output, want.shape[1]), want, atol=2e-4, rtol=0)
        best = np.sort(want[len(request["prompt"]) - 1 :], axis=1)
        for got, token, row in zip(output.token_ids, request["tokens"], best, strict=True):
            assert got == token or row[-1] - row[-2] < CLEAR
