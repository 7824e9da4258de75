# SPDX-License-Identifier: Apache-2.0
"""From a request's body to choices that the engine works on: admission, adapters, tokens."""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.catalog import AdapterCatalog
from server.config import ServerConfig
from server.engine_client import EngineClient
from server.errors import Invalid, TooManyRequests, Unavailable, as_http_error
from server.generation import Generation
from server.messages import Launch, Ready
from server.metrics import Metrics
from server.prompts import PromptEncoder
from slora_jax.cluster import Cluster
from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.selection import find_adapters
from slora_jax.openai.tokens import TokenTexts
from slora_jax.stats import EngineStats
from slora_jax.tokenizer import load_tokenizer

_LONGEST_RETRY_S = 60

logger = logging.getLogger("slora_jax.server")


class FrontEnd:
    """What the routes share: the engine, the adapters, the tokenizer, the counts.

    Args:
        config: the server's.
        options: of the engine, fields of `EngineConfig`.
        cluster: the processes of the engine, if there are several.
        progress: draw bars on stderr while the engine loads.
        quiet: no messages on stderr.
        engine_module: that the engine's process runs.

    Raises:
        TokenizerError: the model's tokenizer cannot be loaded.
    """

    def __init__(
        self,
        config: ServerConfig,
        options: dict[str, Any],
        cluster: Cluster | None = None,
        *,
        progress: bool = False,
        quiet: bool = False,
        engine_module: str = "server.engine_process",
    ) -> None:
        self.config = config
        self._options = options
        self._cluster = cluster
        self._progress = progress
        self._quiet = quiet
        tokenizer = load_tokenizer(config.model)
        self.texts = TokenTexts(tokenizer)
        self.prompts = PromptEncoder(tokenizer)
        self.metrics = Metrics(config.base_name, config.max_loras)
        self.client = EngineClient(self._launch, self, restart=config.restart, module=engine_module)
        self.catalog = AdapterCatalog(config, self.client)
        self.metrics.watch(self.client)
        self.draining = False
        self._admitting = 0  # choices on their way to the engine
        self._open = 0  # requests that are being answered

    # The engine's life

    def _launch(self, address: str, restart: bool) -> Launch:
        adapters = self.catalog.begin_anew()
        return Launch(
            address=address,
            model=str(self.config.model),
            options=self._options,
            adapters={name: str(one.path) for name, one in adapters.items()},
            pinned=[name for name, one in adapters.items() if one.pinned],
            restart=restart,
            progress=self._progress,
            quiet=self._quiet,
            cluster=self._cluster,
        )

    def delta(self, generation: Generation, index: int, tokens: int, now: float) -> None:
        self.metrics.delta(generation, index, tokens, now)

    def report(self, stats: EngineStats) -> None:
        self.metrics.report(stats)
        self.metrics.keep_adapters(self.catalog.loaded)

    def ready(self, ready: Ready) -> None:
        logger.info("the engine is ready", extra={"device": ready.device, "pages": ready.num_pages})
        for name, error in ready.failed.items():
            logger.warning("an adapter is lost", extra={"adapter": name, "reason": error})
            self.catalog.forget(name)

    # Draining

    async def drain(self) -> None:
        """Takes no more requests, lets those in progress end, and after a while ends them."""
        self.draining = True
        until = time.monotonic() + self.config.shutdown_timeout_s
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self._open:
            logger.warning("requests are cut off", extra={"requests": self._open})
            self.client.fail_all(Unavailable("the server is shutting down"))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While one request is being answered, draining waits for it."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    # Requests

    async def submit(
        self, request: CompletionRequest | ChatCompletionRequest, arrival: float
    ) -> Generation:
        """Has the engine work on `n` choices for each prompt.

        Args:
            request: what was asked.
            arrival: when it came, on the monotonic clock.

        Raises:
            HttpError: it can't be served, or not now.
        """
        ready = self._check_open()
        count = request.num_prompts * request.n
        self._check_queue(count, ready)
        self._admitting += count
        try:
            params = [request.sampling_params(choice) for choice in range(request.n)]
            base = self.config.served_model_names
            adapters = find_adapters(request, base, self.catalog)
            await self.catalog.ensure_loaded(adapters)
            prompts = await self.prompts.prompts_of(request, ready.max_model_len)
            return self.client.generate(
                prompts,
                adapters,
                params,
                priority=request.priority,
                arrival=arrival,
            )
        except RequestError as error:
            raise as_http_error(error) from error
        finally:
            self._admitting -= count

    def abort(self, generation: Generation) -> None:
        """Has the engine forget what is not finished: nobody waits for it any more."""
        left = sum(not choice.output.finished for choice in generation.choices)
        if left:
            if not generation.failed:
                self.metrics.aborted(left)
            self.client.abort(generation)

    def _check_open(self) -> Ready:
        if self.draining:
            raise Unavailable("the server is shutting down", retry_after=10)
        return self.client.check_ready()

    def _check_queue(self, count: int, ready: Ready) -> None:
        room = ready.max_num_seqs + self.config.max_queued_requests
        if count > room:
            raise Invalid(
                f"the request has {count} choices, the server takes {room} in all: send fewer "
                "prompts at a time, or lower n",
                "n",
            )
        there = self.client.num_running + self._admitting
        if there + count > room:
            raise TooManyRequests(
                f"{there} choices are in progress or wait, and {room} is the most: try again "
                "later, or start the server with a larger --max-queued-requests",
                retry_after=self._retry_after(there),
            )

    def _retry_after(self, waiting: int) -> int:
        """Seconds until half of those who wait will be done, at the rate at which others end."""
        rate = self.metrics.requests_per_second
        seconds = waiting / 2 / rate if rate else 1.0
        return max(1, min(math.ceil(seconds), _LONGEST_RETRY_S))
