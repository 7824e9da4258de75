# SPDX-License-Identifier: Apache-2.0
"""`slora generate` from the command line to the output file."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from slora_jax.cli import generate, main
from slora_jax.core import FinishReason, RequestError, RequestOutput
from slora_jax.demo import BASE_MODEL, adapter_dirs
from slora_jax.openai.errors import ErrorResponse

BEGIN, SEP, END = 256, 257, 258
SMALL = ["--num-pages", "128", "--max-num-seqs", "4", "--decode-batch-sizes", "4"]
SMALL += ["--max-num-batched-tokens", "16", "--quiet"]  # one shape of each kind of step


def ids(text: str) -> list[int]:
    return [BEGIN, *text.encode(), SEP]


def body(model: str, prompt, **fields) -> bytes:
    return json.dumps(
        {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 30} | fields
    ).encode()


def slora_generate(tmp_path: Path, lines: list[bytes], *options: str) -> list[dict]:
    """Runs the command in this process and returns the lines of its output."""
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    code = main(["generate", "--input", str(source), "--output", str(sink), *options])
    assert code == 0
    return [json.loads(line) for line in sink.read_text().splitlines()]


# With the real engine

SLOW_TEXT = "the first and slowest"

# What is served, by name. The first line is the slowest: an adapter's, so that there is no step of
# the base alone, which would be compiled apart.
LINES: dict[str, bytes] = {
    "slow": body("upper", SLOW_TEXT, logprobs=2, return_token_ids=True),
    "upper": body("upper", "hello"),
    "base": body("base", "hello"),
    "no json": b'{"model": "upper"',
    "rot13": body("rot13", "hello", logprobs=1, echo=True),
    "blank": b"  ",
    "unknown": body("lower", "hello"),
    "refused": body("broken", "hello"),
    "ids": body("upper", ids("hello"), prompt_logprobs=1),
    "bad id": body("upper", [260]),
    "choices": body("upper", ["ab", "cd"], n=2, temperature=0.5, seed=1),
    "half bad": body("upper", ["ab", "x" * 300]),
    "stop": body("upper", "hello", stop=["L"]),
    "stream": body("upper", "hello", stream=True),
    "plain": body("upper", "hello", add_special_tokens=False, max_tokens=1, return_token_ids=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    options = ["--model", str(BASE_MODEL), "--served-model-name", "base", *SMALL]
    root = tmp_path_factory.mktemp("adapters")
    for name, directory in adapter_dirs().items():
        (root / name).symlink_to(directory)
    for name in ("broken", "broken too"):
        shutil.copytree(adapter_dirs()["upper"], root / name)
        (root / name / "adapter_model.safetensors").write_bytes(b"")
    options += ["--lora-dir", str(root)]
    found = slora_generate(tmp_path_factory.mktemp("batch"), list(LINES.values()), *options)
    names = [name for name in LINES if name != "blank"]
    return dict(zip(names, found, strict=True))


def texts(result: dict) -> list[str]:
    return [choice["text"] for choice in result["choices"]]


def test_results_are_in_input_order_by_adapter(results):
    assert texts(results["slow"]) == [SLOW_TEXT.upper()]
    assert texts(results["base"]) == ["hello"]
    assert texts(results["upper"]) == ["HELLO"]
    assert texts(results["rot13"]) == ["hellouryyb"]  # echoed
    assert texts(results["stop"]) == ["HE"]
    assert [results[name]["model"] for name in ("base", "rot13")] == ["base", "rot13"]


def test_choices_are_numbered_prompt_by_prompt(results):
    assert [choice["index"] for choice in results["choices"]["choices"]] == [0, 1, 2, 3]
    assert texts(results["choices"]) == ["AB", "AB", "CD", "CD"]


def test_text_and_its_token_ids_are_the_same_prompt(results):
    assert texts(results["ids"]) == texts(results["upper"])
    assert results["ids"]["usage"] == results["upper"]["usage"]
    assert results["plain"]["choices"][0]["prompt_token_ids"] == list(b"hello")


def test_token_ids_and_logprobs(results):
    choice = results["slow"]["choices"][0]
    assert choice["prompt_token_ids"] == ids(SLOW_TEXT)
    assert choice["token_ids"] == [*SLOW_TEXT.upper().encode(), END]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] + "<|end|>"
    assert logprobs["text_offset"] == list(range(len(SLOW_TEXT) + 1))
    lists = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*lists, strict=True):
        assert len(top) == 2
        assert max(top, key=lambda name: top[name]) == token  # it was greedy
        assert top[token] == logprob
    echoed = results["rot13"]["choices"][0]["logprobs"]
    assert echoed["tokens"] == ["<|begin|>", *"hello", "<|sep|>", *"uryyb", "<|end|>"]
    assert [p is None for p in echoed["token_logprobs"]] == [True] + [False] * 12
    prompt_logprobs = results["ids"]["choices"][0]["prompt_logprobs"]
    assert [p and min(e["rank"] for e in p.values()) for p in prompt_logprobs] == [None] + [1] * 6
    assert prompt_logprobs[1][str(ord("h"))]["decoded_token"] == "h"


@pytest.mark.parametrize(
    ("name", "param", "code"),
    [
        ("no json", None, 400),
        ("unknown", "model", 404),
        ("refused", "model", 400),
        ("bad id", "prompt", 400),
        ("half bad", "prompt", "context_length_exceeded"),
        ("stream", "stream", 400),
    ],
)
def test_a_bad_line_is_an_error_in_its_place(results, name, param, code):
    error = results[name]["error"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.long
def test_without_a_tokenizer(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BASE_MODEL, model, ignore=shutil.ignore_patterns("tokenizer*"))
    adapters = [f"{name}={path}" for name, path in adapter_dirs().items() if name == "upper"]
    lines = [
        body("upper", ids("abc"), return_token_ids=True, logprobs=0),
        body("upper", "abc"),
        body("model", ids("abc"), stop=["b"]),
    ]
    options = ["--model", str(model), "--lora-modules", *adapters, *SMALL]
    good, *bad = slora_generate(tmp_path, lines, *options)
    choice = good["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [*b"ABC", END])
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*b"ABC", END]]
    assert ["tokenizer" in result["error"]["message"] for result in bad] == [True, True]


# With an engine that needs no time


class FakeEngine:
    """Runs `max_num_seqs` requests at a time, first come, first served; each step is a token."""

    def __init__(self, max_num_seqs: int = 2) -> None:
        self.options = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.tokenizer, self.adapters = None, SimpleNamespace(store=())
        self.left: dict[str, int] = {}
        self.most_waiting = self.num_added = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.left)

    def add_request(self, prompt, params, *, adapter, priority) -> str:
        if prompt == [0]:
            raise RequestError("no zeros", "prompt")
        self.num_added += 1
        self.left[f"r{self.num_added}"] = prompt[0]
        self.most_waiting = max(self.most_waiting, len(self.left))
        return f"r{self.num_added}"

    def abort(self, request_id: str) -> None:
        del self.left[request_id]

    def step(self) -> list[RequestOutput]:
        running = list(self.left)[: self.options.max_num_seqs]
        for request_id in running:
            self.left[request_id] -= 1
        ended = [request_id for request_id in running if self.left[request_id] == 0]
        for request_id in ended:
            del self.left[request_id]
        return [finished(request_id) for request_id in ended]


def finished(request_id: str) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        adapter=None,
        prompt_token_ids=[1],
        token_ids=[1],
        text=request_id,
        new_token_ids=[],
        new_text="",
        finish_reason=FinishReason.STOP,
    )


def test_a_long_file_is_in_the_engine_in_parts():
    engine = FakeEngine()
    lengths = [50, 1, 1, 7, 1, 1, 1, 3] * 20
    lines = (body("m", [length], request_id=str(i)) for i, length in enumerate(lengths))
    got = [result.to_json() for result in generate.Batch(engine, ["m"]).serve(lines)]
    assert [json.loads(line)["id"] for line in got] == [f"cmpl-{i}" for i in range(len(lengths))]
    assert engine.most_waiting == 8  # four batches


def test_a_result_does_not_wait_for_the_end_of_the_file():
    engine = FakeEngine()
    results = generate.Batch(engine, ["m"]).serve(body("m", [1]) for _ in range(100))
    next(results)
    assert engine.num_added < 20


def test_a_line_is_served_whole_or_not_at_all():
    engine = FakeEngine()
    batch = generate.Batch(engine, ["m"])
    bad, good = batch.serve([body("m", [[1], [2], [0]], n=3), body("m", [[1], [2]])])
    assert isinstance(bad, ErrorResponse)
    assert [choice.text for choice in good.choices] == ["r7", "r8"]


def run_with(monkeypatch, engine: FakeEngine, tmp_path: Path, lines: list[bytes], *options) -> int:
    monkeypatch.setattr(generate, "start_engine", lambda args, progress: (engine, {}))
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(lines))
    return main(["generate", "--model", "m", "--input", str(source), *options])


def test_what_was_done_before_an_interrupt_is_in_whole_lines(monkeypatch, tmp_path, capsys):
    engine, sink = FakeEngine(), tmp_path / "out.jsonl"
    steps = iter(range(5))

    def step():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return FakeEngine.step(engine)

    engine.step = step
    lines = [body("m", [1])] * 50
    assert run_with(monkeypatch, engine, tmp_path, lines, "--output", str(sink)) == 130
    assert capsys.readouterr().err == "slora generate: interrupted\n"
    done = sink.read_text().splitlines(keepends=True)
    assert 0 < len(done) < 50
    assert all(json.loads(line) and line.endswith("\n") for line in done)


@pytest.mark.parametrize("quiet", [True, False])
def test_stdout_holds_results_only(monkeypatch, tmp_path, capfd, quiet):
    lines = [body("m", [1]), b"{", body("m", [1])]
    options = ["--output", "-", "--quiet"] if quiet else ["--output", "-"]
    assert run_with(monkeypatch, FakeEngine(), tmp_path, lines, *options) == 0
    out, err = capfd.readouterr()
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True, False]
    assert err.startswith("" if quiet else "2 done, 1 failed, 2 tokens in ")
    assert err.count("\n") == (not quiet)


def test_messages_go_to_stderr_while_a_command_runs(monkeypatch, tmp_path, capsys):
    logger = logging.getLogger("slora_jax.engine")

    class TalkingEngine(FakeEngine):
        def step(self):
            logger.info("compiling")
            return super().step()

    sink = str(tmp_path / "out.jsonl")
    run_with(monkeypatch, TalkingEngine(), tmp_path, [body("m", [1])], "--output", sink)
    assert "compiling" in capsys.readouterr().err
    assert not logging.getLogger("slora_jax").handlers
