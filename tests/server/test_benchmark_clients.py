# SPDX-License-Identifier: Apache-2.0
"""What the benchmark clients of vLLM 0.33 and SGLang 0.5.23 send, and how they read the answer."""

import json
from typing import Any

import httpx
import pytest

UPPER = "HELLO READER"


def vllm_events(server, path: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """As vLLM reads a stream: split at blank lines, `data: ` taken off, the rest is JSON."""
    headers = {"x-request-id": "bench-0123abcd-0", "Authorization": "Bearer none"}
    response = httpx.post(server.url + path, json=payload, headers=headers, timeout=60)
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "bench-0123abcd-0"
    messages = [one for one in response.text.split("\n\n") if one]
    assert messages.pop() == "data: [DONE]"
    return [json.loads(one.removeprefix("data: ")) for one in messages]


@pytest.mark.parametrize("prompt", ["hello reader", [256, *b"hello reader", 257]])
def test_vllm_completions(server, prompt):
    payload = {
        "model": "upper",  # --lora-modules
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": 24,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
    }
    events = vllm_events(server, "/v1/completions", payload)
    with_choices = [event for event in events if event["choices"]]
    usage = [event["usage"] for event in events if not event["choices"]]
    assert "".join(event["choices"][0]["text"] for event in with_choices).startswith(UPPER)
    assert [one["completion_tokens"] for one in usage] == [24]


def test_vllm_chat(server):
    payload = {
        "model": "upper",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello reader"}]}],
        "max_completion_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    events = vllm_events(server, "/v1/chat/completions", payload)
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta["content"] for delta in deltas) == UPPER
    assert events[-1]["usage"]["completion_tokens"] == len(UPPER) + 1


def test_vllm_asks_for_the_model_and_its_tokens(server):
    first = server.get("/v1/models").json()["data"][0]
    assert first["id"] == "slora-demo"
    assert first["root"]
    body = {"model": "slora-demo", "prompt": "hi", "add_special_tokens": False}
    tokens = server.post("/tokenize", body).json()["tokens"]
    assert tokens == list(b"hi")
    detokenized = server.post("/detokenize", {"model": "slora-demo", "tokens": tokens}).json()
    assert detokenized == {"prompt": "hi"}


def sglang_text(server, path: str, payload: dict[str, Any]) -> str:
    """As SGLang reads a stream: line by line, every one of them `data: ` and JSON."""
    text = ""
    response = httpx.post(server.url + path, json=payload, timeout=60)
    for line in filter(None, response.text.split("\n")):
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            continue
        event = json.loads(data)
        choice = event["choices"][0]
        text += choice["text"] if "text" in choice else choice["delta"]["content"]
        assert (event.get("usage") or {}).get("completion_tokens", 0) == 0
    return text


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_sglang(server, kind):
    payload = {
        "model": "upper",
        "lora_path": "upper",  # both, "to accommodate different LoRA conventions"
        "stream": True,
        "temperature": 0.0,
        "ignore_eos": False,
    }
    if kind == "completions":
        payload |= {"prompt": "hello reader", "best_of": 1, "max_tokens": 24}
    else:
        content = {"role": "user", "content": "hello reader"}
        payload |= {"messages": [content], "max_completion_tokens": 24}
    assert sglang_text(server, f"/v1/{kind}", payload) == UPPER


def test_sglang_names_adapters_beside_the_base(server):
    common = {"prompt": "hello", "temperature": 0}
    texts = [
        server.post("/v1/completions", {**common, **fields}).json()["choices"][0]["text"]
        for fields in (
            {"model": "slora-demo:upper"},
            {"model": "slora-demo", "lora_path": "upper"},
            {"model": "slora-demo"},
        )
    ]
    assert texts == ["HELLO", "HELLO", "hello"]
    body = {**common, "prompt": ["hello"] * 2, "model": "slora-demo", "lora_path": ["rot13", None]}
    both = server.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in both] == ["uryyb", "hello"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "slora-demo:nobody"}, 404, "model"),
        ({"model": "nobody:upper"}, 404, "model"),
        ({"model": "slora-demo", "lora_path": "nobody"}, 404, "lora_path"),
        ({"model": "upper", "lora_path": "rot13"}, 400, "model"),
        ({"model": "slora-demo", "lora_path": ["upper", "upper"]}, 400, "lora_path"),
    ],
)
def test_never_is_the_base_served_in_an_adapters_place(server, fields, status, param):
    response = server.post("/v1/completions", {"prompt": "hello", **fields})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
