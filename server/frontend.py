# SPDX-License-Identifier: Apache-2.0
"""From a request's body to choices that the engine works on: admission, adapters, tokens."""

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from server.admission import Admission
from server.catalog import AdapterCatalog
from server.config import ServerConfig
from server.engine_client import EngineClient
from server.errors import Unavailable, as_http_error
from server.generation import Generation
from server.messages import Launch, Ready
from server.metrics import Metrics
from server.prompts import PromptEncoder
from slora_jax.cluster import Cluster
from slora_jax.core import RequestError
from slora_jax.openai.chat import ChatCompletionRequest
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.selection import find_adapters, names_in
from slora_jax.openai.tokens import TokenTexts
from slora_jax.stats import EngineStats
from slora_jax.tokenizer import load_tokenizer

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
        # Two: one slow request does not hold up another, and there is one lock for all Python.
        self.threads = ThreadPoolExecutor(2, "slow")
        self.prompts = PromptEncoder(tokenizer, self.threads)
        self.metrics = Metrics(config.base_name, config.max_loras)
        self.client = EngineClient(self._launch, self, restart=config.restart, module=engine_module)
        self.catalog = AdapterCatalog(config, self.client)
        self.metrics.watch(self.client)
        self.admission = Admission(config, lambda: self.metrics.requests_per_second)
        self.draining = False
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
        self,
        request: CompletionRequest | ChatCompletionRequest,
        arrival: float,
        key: str | None,
        held: ExitStack,
    ) -> Generation:
        """Has the engine work on `n` choices for each prompt.

        Args:
            request: what was asked.
            arrival: when it came, on the monotonic clock.
            key: the client's, in a form that may be shown; None: no keys are asked for.
            held: until it is closed, the request has a place.

        Raises:
            HttpError: it can't be served, or not now.
        """
        ready = self._check_open()
        self.config.check(request)
        try:
            bases = self.config.served_model_names
            known = await self.catalog.known(names_in(request, bases))
            adapters = find_adapters(request, bases, known)
            tenant = key or next(filter(None, adapters), self.config.base_name)
            count = request.num_prompts * request.n
            admission = self.admission
            place = held.enter_context(admission.place(tenant, count, ready.max_num_seqs))
            params = request.sampling_params()
            await self.catalog.ensure_loaded(adapters)
            place.check()
            prompts = await self.prompts.prompts_of(request, ready.max_model_len)
            place.check()
        except RequestError as error:
            raise as_http_error(error) from error
        admission.charge(tenant, sum(map(len, prompts)))
        generation = self.client.generate(
            prompts, adapters, params, request.n, priority=request.priority, arrival=arrival
        )
        place.begin(generation)
        held.callback(self.abort, generation)
        held.callback(lambda: admission.charge(tenant, generation.num_tokens))
        return generation

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
