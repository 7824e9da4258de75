# SPDX-License-Identifier: Apache-2.0
"""What the README and docs/serving.md say of the server is so: options, metrics, examples."""

import argparse
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.command import add_arguments

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "named"), [("Options", "server"), ("Limits", "limits of what clients may cost")]
)
def test_every_option_of_the_server(title, named):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    [group] = [group for group in parser._action_groups if group.title == named]
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", section(title), flags=re.MULTILINE)
    described = {
        flag: default for flags, default in rows for flag in re.findall(r"--[\w-]+", flags)
    }
    actual = {action.option_strings[0]: action.default for action in group._group_actions}
    assert described.keys() == actual.keys()
    for flag, default in actual.items():
        if isinstance(default, float | int) and not isinstance(default, bool):
            assert f"{default:g}" in described[flag], flag
        elif isinstance(default, str):
            assert default in described[flag], flag


def test_every_metric(server):
    server.post("/v1/completions", {"model": "upper", "prompt": "hello", "temperature": 0})
    families = text_string_to_metric_families(server.get("/metrics").text)
    actual = {
        f.name + ("_total" if f.type == "counter" else ""): {*f.samples[0].labels} - {"le"}
        for f in families
        if not f.name.endswith("_created")
    }
    described = {}
    for row in re.findall(r"^\| (`.*) \|$", section("Metrics"), flags=re.MULTILINE):
        labels = re.findall(r"`(\w+)`", "".join(re.findall(r"\[(.*?)\]", row)))
        for name in re.findall(r"`((?:vllm|slora):\w+)`", row):
            described[name] = {*labels} or {"model_name", "engine"}
    assert described == actual


def test_the_line_of_a_log(server):
    [shown] = re.findall(r"```json\n(.*?)\n```", section("Logs"), flags=re.DOTALL)
    body = {"model": "upper", "prompt": "hello", "temperature": 0, "stream": True}
    server.post("/v1/completions", body, headers={"X-Request-Id": "of-the-document"})
    written: list[dict] = []

    def is_written() -> bool:
        written[:] = [one for one in server.lines() if one.get("request_id") == "of-the-document"]
        return bool(written)

    server.wait_for(is_written)
    assert list(written[0]) == list(json.loads(shown))


def test_the_readmes_example(server):
    [body] = re.findall(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text())
    response = server.post("/v1/completions", json.loads(body))
    assert response.json()["choices"][0]["text"] == "uryyb ernqre"
