# SPDX-License-Identifier: Apache-2.0
"""The baselines' own part: which requests run together, and when each has its tokens."""

import argparse
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks.baselines import vllm_lora
from benchmarks.baselines.batching import OneAdapterAtATime
from benchmarks.replay import replay
from benchmarks.settings import SETTINGS, arrivals_of
from slora_jax.simulator.workloads import Arrival


class Log:
    """A decoder that only remembers what it was asked to do."""

    def __init__(self) -> None:
        self.batches: list[tuple[int | None, list[int], int]] = []  # adapter, requests, steps

    def start(self, adapter, numbers) -> None:
        self.batches.append((adapter, list(numbers), 1))

    def step(self) -> None:
        adapter, numbers, steps = self.batches.pop()
        self.batches.append((adapter, numbers, steps + 1))


def test_the_longest_queue_is_next_as_many_as_fit_to_the_longest_output():
    log = Log()
    arrivals = [Arrival(0.0, adapter, 8, 1 + number) for number, adapter in enumerate([1, 0, 0, 0])]
    served, _ = replay(OneAdapterAtATime(log, 2, lambda: 0.0), arrivals, 60.0, drain=False)
    assert log.batches == [(0, [1, 2], 3), (1, [0], 1), (0, [3], 4)]
    assert all(one.finished for one in served)
    assert [len(one.tokens) for one in served] == [1, 2, 3, 4]


def test_time_in_the_queue_is_counted():
    now = iter([1.0, 2.0, 5.0, 9.0])
    serving = OneAdapterAtATime(Log(), 1, lambda: next(now))
    serving.add(0, Arrival(0.0, None, 8, 1))
    serving.add(1, Arrival(0.0, None, 8, 1))
    waits = [[(one.request_id, one.queue_seconds) for one in serving.step()] for _ in range(2)]
    assert waits == [[("0", 4.0)], [("1", 7.0)]]
    assert not serving.is_busy


def test_a_run_ends_on_time_whatever_is_left():
    arrivals = [Arrival(0.0, 0, 8, 10**9), Arrival(100.0, 0, 8, 1)]
    served, end = replay(OneAdapterAtATime(Log(), 4, lambda: 0.0), arrivals, 0.05, drain=False)
    assert 0.05 <= end < 5
    [one] = served
    assert one.tokens
    assert not one.finished


def test_adapters_for_vllm_have_the_settings_ranks(tmp_path):
    setting = SETTINGS["tiny"]
    paths = vllm_lora.write_all(tmp_path, setting, 3)
    fields = [json.loads((path / "adapter_config.json").read_text()) for path in paths]
    assert [one["r"] for one in fields] == [16, 8, 16]
    assert len({str(path) for path in paths}) == 3


class FakeEngine:
    """vLLM's engine as far as it is used: every request gets two tokens a step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.asked: dict[str, tuple] = {}
        self.engine_core = SimpleNamespace(shutdown=self.left.clear)
        self.added: list[tuple] = []

    def add_lora(self, request) -> None:
        self.added.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def add_request(self, request_id, prompt, params, lora_request=None) -> None:
        self.left[request_id] = params.max_tokens
        self.asked[request_id] = (len(prompt["prompt_token_ids"]), lora_request)

    def step(self) -> list:
        metrics = SimpleNamespace(queued_ts=1.0, scheduled_ts=1.5)
        outputs = []
        for name, left in list(self.left.items()):
            tokens = min(left, 2)
            self.left[name] -= tokens
            if not self.left[name]:
                del self.left[name]
            one = SimpleNamespace(token_ids=[0] * tokens)
            outputs.append(SimpleNamespace(request_id=name, outputs=[one], metrics=metrics))
        return outputs

    def abort_request(self, request_ids) -> None:
        for name in request_ids:
            self.left.pop(name, None)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package, where it is not installed: `engines` has what it made."""
    engines: list[FakeEngine] = []
    options: list[dict] = []

    def from_engine_args(given):
        engines.append(FakeEngine())
        options.append(given)
        return engines[-1]

    module = ModuleType("vllm")
    module.__dict__.update(
        __version__="0.26.0",
        EngineArgs=lambda **given: given,
        LLMEngine=SimpleNamespace(from_engine_args=from_engine_args),
        SamplingParams=lambda **given: SimpleNamespace(**given),
        engines=engines,
        options=options,
    )
    lora, params = ModuleType("vllm.lora.request"), ModuleType("vllm.sampling_params")
    lora.__dict__["LoRARequest"] = lambda name, number, path: (name, number, path)
    params.__dict__["RequestOutputKind"] = SimpleNamespace(DELTA="delta")
    for one in (module, lora, params):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    return module


def test_vllm_is_asked_for_the_same_trace(vllm, tmp_path):
    file = tmp_path / "results.jsonl"
    arguments = "--setting tiny --rate 40 --duration 0.5 --adapters 0,3 --repetitions 1 --slots 2"
    assert vllm_lora.main([*arguments.split(), "--results", str(file)]) == 0
    base, three = [json.loads(text) for text in file.read_text().splitlines()]
    assert (base["benchmark"], base["adapters"], three["adapters"]) == ("vllm_lora", 0, 3)
    assert base["requests"] == three["requests"] > 0
    assert three["vllm"] == "0.26.0"
    assert "enable_lora" not in vllm.options[0]
    assert (vllm.options[1]["max_loras"], vllm.options[1]["max_cpu_loras"]) == (2, 3)
    expected = arrivals_of(argparse.Namespace(**TRACE), 3)
    asked = {name: one for name, one in vllm.engines[1].asked.items() if name.startswith("1-")}
    assert three["requests"] == len(asked)
    for name, (prompt, lora) in asked.items():
        one = expected[int(name[2:])]
        assert one.adapter is not None
        assert prompt == one.prompt
        assert lora[:2] == (f"adapter-{one.adapter}", one.adapter + 1)


TRACE = {
    "setting": "tiny",
    "rate": 40.0,
    "duration": 0.5,
    "popularity": "power",
    "alpha": 1.0,
    "cv": 1.0,
    "lengths": "uniform",
    "seed": 0,
}
