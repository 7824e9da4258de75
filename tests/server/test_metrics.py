# SPDX-License-Identifier: Apache-2.0
"""What Prometheus, dashboards and LoRA-aware gateways read."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import max_lora
from slora_jax.stats import AdapterStats, EngineStats


def families(server) -> dict:
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


@pytest.fixture
def found(server) -> dict:
    for model in ("upper", "rot13", "slora-demo"):  # the warm-up may have left one in the pool
        server.post("/v1/completions", {"model": model, "prompt": "hello", "temperature": 0})
    server.wait_for(lambda: server.status()["running"] == 0)
    return families(server)


def test_what_the_gateway_asks_for(found):
    """Gateway API Inference Extension, proposal 003: names, types, labels, values."""
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        family = found[f"vllm:{name}"]
        assert family.type == "gauge"
        [sample] = family.samples  # it takes the first series and adds up none
        assert sample.value == 0
    [cache] = found["vllm:cache_config_info"].samples
    assert int(cache.labels["block_size"]) == 16
    assert int(cache.labels["num_gpu_blocks"]) == 1023
    lora = found["vllm:lora_requests_info"]
    assert lora.type == "gauge"
    [sample] = lora.samples
    assert sample.labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert int(sample.labels["max_lora"]) >= 1
    assert "upper" in sample.labels["running_lora_adapters"].split(",")
    assert sample.labels["waiting_lora_adapters"] == ""
    assert abs(sample.value - time.time()) < 60


def test_latencies_and_counts(found):
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "lora_adapter_load_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        family = found[f"vllm:{name}"]
        assert family.type == "histogram"
        [count] = [one for one in family.samples if one.name.endswith("_count")]
        assert count.labels == {"model_name": "slora-demo", "engine": "0"}
        assert count.value > 0
    for name in ("prompt_tokens", "generation_tokens"):
        assert found[f"vllm:{name}"].samples[0].value > 0
    reasons = {one.labels["finished_reason"] for one in found["vllm:request_success"].samples}
    assert "stop" in reasons


def test_single_adapters(found):
    loaded = {one.labels["adapter_name"]: one for one in found["vllm:lora_adapter_loaded"].samples}
    assert loaded["upper"].labels["level"] == "gpu"
    assert loaded["upper"].labels["pinned"] == "false"
    assert int(loaded["upper"].labels["rank"]) > 0
    first = found["slora:adapter_time_to_first_token_seconds"].samples
    counts = {one.labels["adapter_name"]: one.value for one in first if one.name.endswith("_count")}
    assert counts["upper"] >= 1
    assert counts["slora-demo"] >= 1
    pages = {
        (one.labels["use"], one.labels["adapter_name"]): one.value
        for one in found["slora:pool_pages"].samples
    }
    assert sum(pages.values()) == 1023
    for name in ("lora_cache_hits", "lora_cache_misses", "lora_evictions"):
        assert f"slora:{name}" in found


def stats(pages: int, *residents: int) -> EngineStats:
    return EngineStats(
        running=0,
        waiting=0,
        running_adapters=(),
        waiting_adapters=(),
        pages=pages,
        kv_pages=0,
        free_pages=pages - sum(residents),
        residents=tuple(
            AdapterStats(names=(f"{i}",), pages=n, rank=8, users=0, pinned=False)
            for i, n in enumerate(residents)
        ),
        loaded=0,
        in_host_memory=0,
        hits=0,
        misses=0,
        evictions=0,
        preemptions=0,
        steps=0,
        load_seconds=(),
    )


def test_max_lora():
    """As given; else as many adapters of the mean resident size as the pool holds."""
    assert max_lora(stats(100, 10, 30), 256, None) == 5
    assert max_lora(stats(100, 10, 30), 3, None) == 3
    assert max_lora(stats(100, 10, 30), 256, 7) == 7
    assert max_lora(stats(100), 256, None) == 256
