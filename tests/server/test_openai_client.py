# SPDX-License-Identifier: Apache-2.0
"""The official client works unchanged, and every adapter's answer is its own."""

import asyncio

import openai
import pytest

from slora_jax.demo.tasks import COPY, TASKS, held_out_prompts

NAMES = ["slora-demo", "upper", "rot13", "leet", "stars", "title", "lazy_upper"]


def wanted(model: str, prompt: str) -> str:
    task = COPY if model == "slora-demo" else TASKS[model.removeprefix("lazy_")]
    return task.transform(prompt)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def messages(prompt: str) -> list:
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]


def test_models(client):
    cards = {card.id: card for card in client.models.list()}
    assert set(NAMES) <= cards.keys()
    assert cards["upper"].parent == "slora-demo"
    assert client.models.retrieve("lazy_rot13").root.endswith("lazy_rot13")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_completion(client):
    got = client.completions.create(
        model="upper", prompt="hello reader", temperature=0, max_tokens=32
    )
    assert got.choices[0].text == "HELLO READER"
    assert got.choices[0].finish_reason == "stop"
    assert got.model == "upper"
    assert got.usage.completion_tokens == len("HELLO READER") + 1


def test_completion_stream(client):
    stream = client.completions.create(
        model="rot13",
        prompt=["hello", "reader"],
        n=2,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage, finished = ["", "", "", ""], None, 0
    for chunk in stream:
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finished += choice.finish_reason is not None
    assert texts == ["uryyb", "uryyb", "ernqre", "ernqre"]
    assert finished == 4
    assert usage.completion_tokens == sum(len(text) + 1 for text in texts)
    assert usage.prompt_tokens == len("hello") + len("reader") + 2 * 2


def test_chat(client):
    got = client.chat.completions.create(
        model="upper", messages=messages("hello reader"), temperature=0, logprobs=True
    )
    assert got.choices[0].message.content == "HELLO READER"
    assert got.choices[0].message.role == "assistant"
    content = got.choices[0].logprobs.content
    assert "".join(one.token for one in content).startswith("HELLO READER")
    assert all(one.logprob <= 0 and one.top_logprobs == [] for one in content)


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="upper",
        messages=messages("hello reader"),
        temperature=0,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=40,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "HELLO READER"
    shown = [one for chunk in chunks if chunk.choices[0].logprobs
             for one in chunk.choices[0].logprobs.content]  # fmt: skip
    assert len(shown) == len("HELLO READER") + 1
    assert all(len(one.top_logprobs) == 2 for one in shown)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_types(client, stream):
    def ask(**fields):
        base = {"model": "upper", "prompt": "x", "stream": stream}
        return client.completions.create(**base | fields)

    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        ask(model="nobody")
    assert missing.value.body["param"] == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=-1)
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        ask(logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError, match="max_model_len 256"):
        ask(prompt="x" * 300)
    with pytest.raises(openai.BadRequestError, match="token ids"):
        ask(prompt=[10**6])


def test_mixed_requests_at_once(server):
    """64 at a time: adapters, base, completions, chats, streams or not."""
    prompts = held_out_prompts(5, 64)

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        model, prompt = NAMES[number % len(NAMES)], prompts[number]
        common = {"model": model, "temperature": 0, "max_tokens": 64}
        kind = number // 2 % 2
        if number % 2 == 0:
            if kind:
                got = await client.chat.completions.create(messages=messages(prompt), **common)
                return got.choices[0].message.content
            got = await client.completions.create(prompt=prompt, **common)
            return got.choices[0].text
        text = ""
        if kind:
            stream = await client.chat.completions.create(
                messages=messages(prompt), stream=True, **common
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content
            return text
        stream = await client.completions.create(prompt=prompt, stream=True, **common)
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    texts = asyncio.run(ask_all())
    right = [
        text == wanted(NAMES[number % len(NAMES)], prompts[number])
        for number, text in enumerate(texts)
    ]
    assert sum(right) >= 62, "an adapter is right on 95 % of what it has not seen"
