# SPDX-License-Identifier: Apache-2.0
"""`/metrics`, under vLLM's names so that dashboards and LoRA-aware gateways work unchanged.

The Kubernetes Gateway API Inference Extension reads `num_requests_running`, `num_requests_waiting`,
`kv_cache_usage_perc`, `lora_requests_info` and `cache_config_info` (its proposal 003). What vLLM
has no name for, or has only proposed one, is about single adapters and the page pool.
"""

import time
from collections import deque
from collections.abc import Container, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.engine_client import EngineClient
from server.generation import Generation
from slora_jax.core import FinishReason
from slora_jax.stats import EngineStats

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000)
_LEAST_S = 0.1
_RATE_S = 5.0  # over which the rates of the page at / are taken


class Metrics:
    """Counts what requests do, and shows the engine's last report.

    Args:
        base_name: the label `model_name`.
        max_loras: as given by the user; None: see `max_lora`.
    """

    def __init__(self, base_name: str, max_loras: int | None) -> None:
        self.registry = CollectorRegistry()
        self._max_loras = max_loras
        labels = ("model_name", "engine")
        self._values = base_name, "0"

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            family = Histogram(
                f"vllm:{name}", text, labels, buckets=buckets, registry=self.registry
            )
            return family.labels(*self._values)

        def counter(name: str, text: str) -> Counter:
            family = Counter(f"vllm:{name}", text, labels, registry=self.registry)
            return family.labels(*self._values)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "From one token of a request to its next."
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "The mean of it over a request."
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = histogram(
            "request_queue_time_seconds", "Before a request first got a place in the batch."
        )
        self._load = histogram(
            "lora_adapter_load_seconds",
            "From when an adapter was wanted in the pool until it was ready on the device.",
        )
        self._request_prompt = histogram("request_prompt_tokens", "Of a prompt.", _TOKENS)
        self._request_output = histogram("request_generation_tokens", "Of an output.", _TOKENS)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._output_tokens = counter("generation_tokens", "Tokens that were generated.")
        self._success = Counter(
            "vllm:request_success",
            "Choices that ended, by reason.",
            (*labels, "finished_reason"),
            registry=self.registry,
        )
        self._adapter_first_token = Summary(
            "slora:adapter_time_to_first_token_seconds",
            "From a request's arrival to its first token, by adapter.",
            ("adapter_name",),
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "slora:adapter_generation_tokens",
            "Tokens that were generated, by adapter.",
            ("adapter_name",),
            registry=self.registry,
        )
        self._recent: deque[tuple[float, int, int]] = deque()  # time, tokens and ends so far
        self._adapters: set[str] = set()  # that have series
        self._tokens = 0
        self._ends = 0
        self.mean_first_token_s: float | None = None

    # What happens

    def delta(self, generation: Generation, index: int, tokens: int, now: float) -> None:
        """Takes note of new tokens of a choice, and of its end."""
        choice = generation.choices[index]
        output = choice.output
        name = output.adapter or self._values[0]
        if output.adapter is not None:
            self._adapters.add(output.adapter)
        if tokens:
            if choice.first_token is None:
                choice.first_token = now
                waited = now - generation.arrival
                self._first_token.observe(waited)
                self._adapter_first_token.labels(name).observe(waited)
                self._prompt_tokens.inc(len(output.prompt_token_ids))
                if output.queue_seconds is not None:
                    self._queue.observe(output.queue_seconds)
                self._smooth_first_token(waited)
            elif choice.last_token is not None:
                self._inter_token.observe(now - choice.last_token)
            choice.last_token = now
            self._output_tokens.inc(tokens)
            self._adapter_tokens.labels(name).inc(tokens)
            self._tokens += tokens
        if output.finish_reason is not None:
            self._ended(generation, index, now)

    def _ended(self, generation: Generation, index: int, now: float) -> None:
        self._ends += 1
        choice = generation.choices[index]
        output, first = choice.output, choice.first_token
        count = len(output.token_ids)
        self._success.labels(*self._values, str(output.finish_reason)).inc()
        self._whole.observe(now - generation.arrival)
        self._request_prompt.observe(len(output.prompt_token_ids))
        self._request_output.observe(count)
        if first is not None and count > 1:
            self._per_token.observe((now - first) / (count - 1))

    def aborted(self, choices: int) -> None:
        """Takes note of choices that nobody waits for any more."""
        self._success.labels(*self._values, str(FinishReason.ABORT)).inc(choices)

    def report(self, stats: EngineStats) -> None:
        """Takes note of the engine's report."""
        now = time.monotonic()
        for seconds in stats.load_seconds:
            self._load.observe(seconds)
        self._recent.append((now, self._tokens, self._ends))
        while self._recent[0][0] < now - _RATE_S:
            self._recent.popleft()

    def keep_adapters(self, names: Container[str]) -> None:
        """Drops the series of adapters that are no more."""
        gone = {name for name in self._adapters if name not in names}
        self._adapters -= gone
        for name in gone:
            for family in (self._adapter_first_token, self._adapter_tokens):
                family.remove_by_labels({"adapter_name": name})

    @property
    def tokens_per_second(self) -> float:
        """Over the last seconds."""
        return self._rate(1)

    @property
    def requests_per_second(self) -> float:
        """Choices that ended, over the last seconds."""
        return self._rate(2)

    def _rate(self, column: int) -> float:
        if len(self._recent) < 2:
            return 0.0
        first, last = self._recent[0], self._recent[-1]
        # Reports that came together after a stall say nothing of a rate.
        return (last[column] - first[column]) / max(last[0] - first[0], _LEAST_S)

    def _smooth_first_token(self, seconds: float) -> None:
        before = self.mean_first_token_s
        self.mean_first_token_s = seconds if before is None else 0.9 * before + 0.1 * seconds

    # What the engine says

    def watch(self, client: EngineClient) -> None:
        """Shows an engine's state beside what is counted here."""
        self.registry.register(_EngineCollector(client, self._values, self._max_loras))


class _EngineCollector(Collector):
    """Metrics from the engine's last report; a dead engine runs nothing and holds nothing."""

    def __init__(
        self, client: EngineClient, values: tuple[str, str], max_loras: int | None
    ) -> None:
        self._client = client
        self._values = values
        self._max_loras = max_loras

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats, ready = self._client.stats, self._client.ready
        yield self._gauge("num_requests_running", "In the batch.", stats.running if stats else 0)
        yield self._gauge("num_requests_waiting", "In the queue.", stats.waiting if stats else 0)
        yield self._counter("engine_restarts", "Of the engine.", self._client.num_restarts)
        if ready is not None:
            info = GaugeMetricFamily(
                "vllm:cache_config_info",
                "Of the page pool.",
                labels=("block_size", "num_gpu_blocks", "engine"),
            )
            info.add_metric((str(ready.page_size), str(ready.num_pages), "0"), 1)
            yield info
        if stats is None or ready is None:
            yield self._gauge("kv_cache_usage_perc", "Share of the pool in use.", 0)
            return
        used = sum(one.pages for one in stats.residents if one.users or one.pinned)
        used += stats.kv_pages
        yield self._gauge("kv_cache_usage_perc", "Share of the pool in use.", used / stats.pages)
        yield self._counter("num_preemptions", "Requests computed again.", stats.preemptions)
        yield self._lora_requests(stats, ready.max_loras)
        yield self._gauge(
            "num_gpu_loaded_lora_adapters", "Adapters in the pool.", len(stats.residents)
        )
        yield self._gauge(
            "num_cpu_loaded_lora_adapters", "Adapters in host memory.", stats.in_host_memory
        )
        most = max_lora(stats, ready.max_loras, self._max_loras)
        yield self._gauge("max_gpu_lora_adapters", "Adapters that the pool can hold.", most)
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in the pool.",
            labels=("adapter_name", "level", "pinned", "rank"),
        )
        pages = GaugeMetricFamily(
            "slora:pool_pages", "Pages of the pool by use.", labels=("use", "adapter_name")
        )
        pages.add_metric(("kv", ""), stats.kv_pages)
        pages.add_metric(("free", ""), stats.free_pages)
        for one in stats.residents:
            for name in one.names:
                loaded.add_metric((name, "gpu", str(one.pinned).lower(), str(one.rank)), 1)
            pages.add_metric(("adapter", ",".join(one.names)), one.pages)
        yield loaded
        yield pages
        yield self._counter("lora_cache_hits", "Admissions that found the adapter.", stats.hits)
        yield self._counter("lora_cache_misses", "Those that brought it.", stats.misses)
        yield self._counter("lora_evictions", "Adapters that left the pool.", stats.evictions)

    def _lora_requests(self, stats: EngineStats, slots: int) -> GaugeMetricFamily:
        """The protocol's gauge: its value is a time, its labels are lists.

        `running_lora_adapters` are those that are "loaded in GPU memory and ready", as the protocol
        says, not only those of running requests, as in vLLM.
        """
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in the pool, and those that requests wait for.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        resident = [name for one in stats.residents for name in one.names]
        waiting = [name for name in stats.waiting_adapters if name not in resident]
        most = max_lora(stats, slots, self._max_loras)
        family.add_metric((str(most), ",".join(resident), ",".join(waiting)), time.time())
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{_prefix(name)}:{name}", text, labels=("model_name", "engine"))
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(
            f"{_prefix(name)}:{name}", text, labels=("model_name", "engine")
        )
        family.add_metric(self._values, value)
        return family


def _prefix(name: str) -> str:
    """Ours where neither vLLM nor a proposal to it has a name."""
    ours = ("engine_restarts", "lora_cache_hits", "lora_cache_misses", "lora_evictions")
    return "slora" if name in ours else "vllm"


def max_lora(stats: EngineStats, slots: int, given: int | None) -> int:
    """Adapters that the pool can hold.

    Args:
        stats: the engine's.
        slots: of the engine: more are impossible.
        given: by the user, which says it all.
    """
    if given is not None or not stats.residents:
        return slots if given is None else given
    pages = sum(one.pages for one in stats.residents) / len(stats.residents)
    return max(1, min(slots, int(stats.pages / pages)))
