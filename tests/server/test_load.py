# SPDX-License-Identifier: Apache-2.0
"""Hundreds of open streams, half of which vanish: nothing is lost, nothing leaks."""

import asyncio
import json

import httpx
import pytest

from slora_jax.demo.tasks import COPY, TASKS, held_out_prompts

NAMES = ["slora-demo", "upper", "rot13", "leet", "stars", "title"]


def wanted(number: int, prompt: str) -> str:
    name = NAMES[number % len(NAMES)]
    return (COPY if name == "slora-demo" else TASKS[name]).transform(prompt)


async def read(client: httpx.AsyncClient, number: int, prompt: str, events: int | None) -> str:
    """The text of a stream; of one that is left after so many events, what came so far."""
    body = {
        "model": NAMES[number % len(NAMES)],
        "prompt": prompt,
        "max_tokens": 64 if events is None else 200,
        "ignore_eos": events is not None,
        "temperature": 0,
        "stream": True,
    }
    text, seen, finished = "", 0, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            text += choice["text"]
            finished = choice["finish_reason"] is not None
            seen += 1
            if events is not None and seen >= events:
                return text  # leaving the block closes the connection
    assert finished, "a stream ended early"
    return text


@pytest.mark.parametrize(
    ("streams", "vanishing"),
    [(150, 75), *(pytest.param(500, n, marks=pytest.mark.long) for n in (0, 250))],
)
def test_streams(server, streams, vanishing):
    prompts = held_out_prompts(7, streams)

    async def read_all() -> list[str]:
        limits = httpx.Limits(max_connections=streams, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as client:
            return await asyncio.gather(
                *(
                    read(client, i, prompt, 1 + i % 5 if vanishing and i % 2 == 0 else None)
                    for i, prompt in enumerate(prompts)
                )
            )

    aborted = finished(server, "abort")
    texts = asyncio.run(read_all())
    kept = [i for i in range(streams) if not (vanishing and i % 2 == 0)]
    right = sum(texts[i] == wanted(i, prompts[i]) for i in kept)
    assert right >= 0.93 * len(kept), "some answers are not their adapters'"
    server.wait_for(lambda: idle(server))
    status = server.status()
    pool = status["pool"]
    assert pool["kv"] == 0, "pages of requests that are gone"
    assert pool["adapters"] == 0, "adapters are held by requests that are gone"
    assert pool["cached"] + pool["free"] == pool["pages"]
    assert finished(server, "abort") - aborted == vanishing


def idle(server) -> bool:
    status = server.status()
    return status["running"] == status["waiting"] == 0


def finished(server, reason: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    found = [one for one in lines if one.startswith("vllm:request_success_total") and reason in one]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_at_once(server, stream):
    """Whether it waits for a stream or for a whole answer."""
    body = {"model": "upper", "prompt": "x" * 100, "max_tokens": 150, "ignore_eos": True}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url) as client:
            sending = client.post("/v1/completions", json={**body, "stream": stream})
            asking = asyncio.create_task(sending)
            await asyncio.sleep(0.1)
            asking.cancel()

    before = finished(server, "abort")
    asyncio.run(leave())
    # First that it has been noticed: the engine may have reported last before it came.
    server.wait_for(lambda: finished(server, "abort") == before + 1, 5)
    server.wait_for(lambda: idle(server) and server.status()["pool"]["kv"] == 0, 5)
