# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one step at a time."""

import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax.adapters.peft import AdapterError
from slora_jax.adapters.residency import AdapterCache
from slora_jax.adapters.store import AdapterStore
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.core import Request, RequestError, RequestOutput, SamplingParams
from slora_jax.engine.output import RequestProgress, position_logprobs
from slora_jax.engine.runner import MOST_BANNED, ModelRunner, StepResult
from slora_jax.engine.scheduler import Scheduler
from slora_jax.engine.sizing import pool_pages
from slora_jax.hf_config import read_model_config
from slora_jax.model.loader import dummy_weights, load_weights
from slora_jax.pool.allocator import PagePool, PageUse
from slora_jax.tokenizer import Detokenizer, load_tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Serves one base Llama and many LoRA adapters from one page pool.

    Args:
        model: a Hugging Face directory: `config.json`, safetensors, and a tokenizer if prompts are
            to be text.
        adapters: PEFT directories by name; more can be loaded later.
        **options: the fields of `EngineConfig`.

    Raises:
        ValueError: the model, an adapter or an option is not supported; the message names the
            field and the remedy.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        progress: bool = False,
        **options: Any,
    ):
        model_dir = Path(model)
        self.config = read_model_config(model_dir)
        self.options = _resolve(EngineConfig(**options), self.config)
        self.tokenizer = load_tokenizer(model_dir)
        dtype = jnp.dtype(self.options.dtype)
        if self.options.load_format == "dummy":
            weights = dummy_weights(self.config, dtype, self.options.seed)
        else:
            weights = load_weights(model_dir, self.config, dtype, progress=progress)
        layout = PageLayout(
            self.config.num_key_value_heads, self.config.head_dim, self.options.page_size
        )
        if self.options.num_pages is None:
            pages = pool_pages(self.config, self.options, layout, dtype, temporaries=0)
            self.options = replace(self.options, num_pages=pages)
        assert self.options.num_pages is not None
        self._layout = layout
        self.pool = PagePool(self.options.num_pages)
        self.adapters = AdapterStore(
            self.config,
            layout,
            np.dtype(dtype),
            max_rank=self.options.max_lora_rank,
            capacity=self.pool.capacity,
            model_dir=None if self.options.load_format == "dummy" else model_dir,
        )
        self.cache = AdapterCache(self.pool, self.options.max_loras, self.adapters.num_pages)
        self.scheduler = Scheduler(
            self.pool,
            self.cache,
            page_size=layout.page_size,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.options.max_num_batched_tokens,
        )
        self.runner = ModelRunner(weights, self.config, self.options, layout, self.adapters.packed)
        self._progress: dict[str, RequestProgress] = {}
        self._pending: StepResult | None = None
        self._ids = itertools.count()
        self._random = random.Random(self.options.seed)
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)

    # Adapters

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Makes a PEFT directory servable as `name`; it enters the pool when a request needs it.

        Raises:
            AdapterError: what can't be served as PEFT would; nothing is loaded then.
        """
        self.adapters.register(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter and frees its pages.

        Raises:
            AdapterError: it is unknown, or a request still uses it.
        """
        if name not in self.adapters:
            raise AdapterError(f"the adapter {name!r} cannot be found")
        users = sum(request.adapter == name for request in self.scheduler.requests)
        if users:
            raise AdapterError(
                f"the adapter {name!r} is used by {users} requests: abort them first"
            )
        if name in self.cache:
            self.cache.evict(name)
        self.adapters.unregister(name)

    # Requests

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queues a request and returns its id.

        Args:
            prompt: text, or token ids, which are taken as they are.
            params: defaults to `SamplingParams()`.
            adapter: a loaded adapter's name; None for the base model.
            request_id: must not be that of a request in progress; made up if None.

        Raises:
            RequestError: it can never be served; the message names the field and the remedy.
        """
        params = params or SamplingParams()
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        if request_id in self._progress:
            raise RequestError(f"request_id {request_id!r} is in progress already", "request_id")
        if adapter is not None and adapter not in self.adapters:
            raise RequestError(f"the adapter {adapter!r} does not exist", "adapter")
        tokens = self._encode(prompt)
        assert self.options.max_model_len is not None
        room = self.options.max_model_len - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; with at least one token of output that is "
                f"more than max_model_len {self.options.max_model_len}",
                "prompt",
            )
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        request = Request(
            id=request_id,
            prompt=tokens,
            params=params,
            adapter=adapter,
            stop_ids=self._stop_ids(params),
            seed=random.Random(seed).getrandbits(31),
            max_output=min(params.max_tokens or room, room),
        )
        self._check(request)
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, tokens, params.skip_special_tokens)
        self._progress[request_id] = RequestProgress(
            request, self.config.eos_token_ids, detokenizer
        )
        self.scheduler.add(request)
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its pages; None if it isn't in progress."""
        progress = self._progress.pop(request_id, None)
        if progress is None:
            return None
        self.scheduler.finish(progress.request)
        return progress.abort()

    @property
    def has_unfinished(self) -> bool:
        return bool(self._progress) or self._pending is not None

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then reads the previous one's tokens.

        So the device never waits for Python, and the tokens returned are one step late.

        Returns:
            One output for each request that got a token.
        """
        plan = self.scheduler.schedule()
        previous, self._pending = self._pending, self.runner.run(plan) if plan else None
        if previous is None:
            if plan is None and self._progress:
                raise AssertionError("requests wait, but none can run")
            return []
        return self._read(previous)

    def stream(self) -> Iterator[RequestOutput]:
        """Steps until all requests are finished, giving their outputs as they come."""
        while self.has_unfinished:
            yield from self.step()

    def generate(
        self,
        prompts: Iterable[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Serves prompts in one batch and returns their finished outputs, in order.

        Args:
            prompts: texts or token ids.
            params: for all, or one each.
            adapters: for all, or one each; None is the base model.
        """
        prompts = list(prompts)
        each_params = [params] * len(prompts) if _is_single(params) else list(params)
        each_adapter = [adapters] * len(prompts) if _is_single(adapters) else list(adapters)
        ids: list[str] = []
        try:
            for prompt, one, adapter in zip(prompts, each_params, each_adapter, strict=True):
                ids.append(self.add_request(prompt, one, adapter=adapter))
        except Exception:
            for request_id in ids:  # all or none
                self.abort(request_id)
            raise
        finished = {output.request_id: output for output in self.stream() if output.finished}
        return [finished[request_id] for request_id in ids]

    # Inside

    def _read(self, result: StepResult) -> list[RequestOutput]:
        """Turns a step's results into outputs; waits for them to arrive."""
        tokens = np.asarray(result.tokens).tolist()
        self._read_prompt_logprobs(result)
        outputs = []
        for index, row in enumerate(result.plan.rows):
            request = row.request
            request.in_flight -= row.samples
            progress = self._progress.get(request.id)
            if not row.samples or progress is None or progress.request is not request:
                continue  # a chunk of a prompt, or a request that ended a step ago
            logprobs = None
            if request.params.logprobs is not None and result.logprobs is not None:
                k = self._k(request.params.logprobs)
                logprobs = position_logprobs(result.logprobs, k)(index, tokens[index])
            output = progress.append(tokens[index], logprobs)
            if output.finished:
                del self._progress[request.id]
                self.scheduler.finish(request)
            outputs.append(output)
        return outputs

    def _read_prompt_logprobs(self, result: StepResult) -> None:
        if result.prompt_logprobs is None:
            return
        first = 0
        for row in result.plan.rows:
            request, progress = row.request, self._progress.get(row.request.id)
            if request.params.prompt_logprobs is not None and progress is not None:
                at = position_logprobs(
                    result.prompt_logprobs, self._k(request.params.prompt_logprobs)
                )
                end = min(row.start + len(row.tokens), len(request.prompt) - 1)
                for position in range(row.start, end):
                    target = position + 1
                    found = at(first + position - row.start, request.prompt[target])
                    progress.set_prompt_logprobs(target, found)
            first += len(row.tokens)

    def _k(self, asked: int) -> int:
        return self.config.vocab_size if asked == -1 else asked

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "the model has no tokenizer: give the prompt as a list of token ids", "prompt"
                )
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        vocab = self.config.vocab_size
        for token in tokens:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
                raise RequestError(
                    f"the prompt holds {token!r}; token ids are integers from 0 to {vocab - 1}",
                    "prompt",
                )
        return [int(token) for token in tokens]

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self.config.eos_token_ids
        return frozenset(params.stop_token_ids) | frozenset(eos)

    def _check(self, request: Request) -> None:
        """Refuses what could never be served."""
        params = request.params
        for name in ("logprobs", "prompt_logprobs"):
            asked, most = getattr(params, name), self.options.max_logprobs
            if asked is not None and most != -1 and not 0 <= asked <= most:
                raise RequestError(f"{name} is {asked}; max_logprobs is {most}", name)
            if asked is not None and asked > self.config.vocab_size:
                raise RequestError(f"{name} is more than the {self.config.vocab_size} tokens", name)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids", "stop")
        if params.min_tokens and len(request.stop_ids) > MOST_BANNED:
            raise RequestError(
                f"min_tokens with {len(request.stop_ids)} stop tokens; at most {MOST_BANNED}",
                "stop_token_ids",
            )
        for token in params.stop_token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"stop_token_ids holds {token}, which is no token id", "stop_token_ids"
                )
        tokens = len(request.prompt) + request.max_output - 1
        kv = ceil_div(tokens, self._layout.page_size)
        lora = 0 if request.adapter is None else self.adapters.num_pages(request.adapter)
        if kv + lora > self.pool.capacity:
            raise RequestError(
                f"the request needs {kv} pages for {tokens} tokens of KV cache and {lora} for its "
                f"adapter, the pool has {self.pool.capacity}: raise num_pages, or lower max_tokens",
                "max_tokens",
            )

    def pool_usage(self) -> dict[str, Any]:
        """How the pool's pages are used now: KV, each resident adapter, free."""
        return {
            "pages": self.pool.capacity,
            "page_bytes": self.runner.pool.nbytes // self.pool.num_pages,
            "kv": self.pool.num_used(PageUse.KV),
            "adapters": {name: len(r.pages) for name, r in sorted(self.cache.residents.items())},
            "free": self.pool.num_free,
        }

    def check(self) -> None:
        """Raises AssertionError if a page, a slot or an adapter is lost or shared by mistake."""
        self.scheduler.check(self.options.max_num_seqs, self.options.max_loras)


def _resolve(options: EngineConfig, config: ModelConfig) -> EngineConfig:
    """Fills in what depends on the model and the device."""
    if options.dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        options = replace(options, dtype="float32" if on_cpu else config.torch_dtype)
    longest = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"max_model_len is {options.max_model_len}; the model's max_position_embeddings is "
            f"{longest}"
        )
    return replace(options, max_model_len=options.max_model_len or longest)


def _is_single(value: Any) -> bool:
    return value is None or isinstance(value, str | SamplingParams)
