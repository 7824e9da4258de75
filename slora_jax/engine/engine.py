# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one step at a time."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import choose_backend
from pallas_kernels.layout import PageLayout
from slora_jax.adapters.peft import AdapterError
from slora_jax.adapters.residency import AdapterCache
from slora_jax.adapters.store import AdapterStore
from slora_jax.config import LAYER_MODULES, EngineConfig, ModelConfig
from slora_jax.core import (
    EngineDeadError,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from slora_jax.engine.output import HostLogprobs, RequestProgress
from slora_jax.engine.requests import RequestMaker
from slora_jax.engine.runner import ModelRunner, StepResult
from slora_jax.engine.sizing import check_pool_fits, pool_pages
from slora_jax.hf_config import read_model_config
from slora_jax.model.loader import dummy_weights, load_weights
from slora_jax.pool.allocator import PagePool, PageUse
from slora_jax.scheduling.choice import make_policy
from slora_jax.scheduling.cost_model import CostModel, step_load
from slora_jax.scheduling.scheduler import Scheduler
from slora_jax.tokenizer import Detokenizer, load_tokenizer


class Engine:
    """Serves one base Llama and many LoRA adapters from one page pool.

    Args:
        model: a Hugging Face directory: `config.json`, safetensors, and a tokenizer if prompts are
            to be text.
        adapters: PEFT directories by name; more can be loaded later.
        progress: draw a bar on stderr while weights are loaded.
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
        _keep_compiled_programs(self.options.compilation_cache_dir)
        self.tokenizer = load_tokenizer(model_dir)
        dtype = jnp.dtype(self.options.dtype)
        if self.options.load_format == "dummy":
            weights = dummy_weights(self.config, dtype, self.options.seed)
        else:
            weights = load_weights(model_dir, self.config, dtype, progress=progress)
        layout = _layout(self.config, self.options)
        if self.options.num_pages is None:
            pages = pool_pages(weights, self.config, self.options, layout)
            self.options = replace(self.options, num_pages=pages)
        assert self.options.num_pages is not None
        check_pool_fits(self.options.num_pages, weights, self.config, layout)
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
        self.cost_model = CostModel()  # learns from every step what the next ones will take
        step_tokens = self.options.max_num_batched_tokens
        self.scheduler = Scheduler(
            self.pool,
            self.cache,
            page_size=layout.page_size,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=step_tokens,
            policy=make_policy(self.options, self.cost_model, step_tokens),
        )
        self.runner = ModelRunner(weights, self.config, self.options, layout, self.adapters.packed)
        self._progress: dict[str, RequestProgress] = {}
        self._pending: StepResult | None = None
        self._step_start = 0.0  # when the device began with the pending step
        self._failure: BaseException | None = None
        self._ids = itertools.count()
        self._requests = RequestMaker(
            self.config, self.options, self.tokenizer, self.adapters, self.pool.capacity
        )
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
            raise AdapterError(f"the adapter {name!r} cannot be found: {self.adapters.known()}")
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
        priority: int = 0,
    ) -> str:
        """Queues a request and returns its id.

        Args:
            prompt: text, or token ids, which are taken as they are.
            params: defaults to `SamplingParams()`.
            adapter: a loaded adapter's name; None for the base model.
            request_id: must not be that of a request in progress; made up if None.
            priority: lower goes first, under the policy "priority"; others have no use for it.

        Raises:
            RequestError: it can never be served; the message names the field and the remedy.
        """
        self._check_alive()
        params = params or SamplingParams()
        if request_id is None:
            made_up = (f"request-{number}" for number in self._ids)
            request_id = next(name for name in made_up if name not in self._progress)
        if request_id in self._progress:
            raise RequestError(f"request_id {request_id!r} is in progress already", "request_id")
        if priority and self.options.scheduling_policy != "priority":
            raise RequestError(
                f"priority is {priority}, but the scheduling_policy is "
                f"{self.options.scheduling_policy!r}: start the engine with 'priority'",
                "priority",
            )
        request = self._requests.make(request_id, prompt, params, adapter)
        request.priority = priority
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, request.prompt, params.skip_special_tokens)
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
            One output for each request that got a token, or that the policy turned away.

        Raises:
            EngineDeadError: an earlier step failed.
        """
        self._check_alive()
        try:
            return self._step()
        except BaseException as error:
            # The scheduler took the step as done, and the pool may have been donated to it.
            self._failure = error
            raise

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
        if self._progress:
            raise RuntimeError(
                "generate() needs an idle engine: finish or abort other requests first"
            )
        if isinstance(prompts, str):
            raise RequestError("prompts is a list of prompts, not one string", "prompts")
        prompts = list(prompts)
        if prompts and isinstance(prompts[0], int | np.integer):
            raise RequestError("prompts is a list of prompts, not one list of token ids", "prompts")
        each_params: Sequence[SamplingParams | None] = (
            [params] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        each_adapter: Sequence[str | None] = (
            [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else adapters
        )
        ids: list[str] = []
        try:
            for prompt, one, adapter in zip(prompts, each_params, each_adapter, strict=True):
                ids.append(self.add_request(prompt, one, adapter=adapter))
            finished = {output.request_id: output for output in self.stream() if output.finished}
        finally:
            for request_id in ids:  # all or none
                self.abort(request_id)
        return [finished[request_id] for request_id in ids]

    # Inside

    def _step(self) -> list[RequestOutput]:
        plan = self.scheduler.schedule()
        rejected = [
            self._progress.pop(rejection.request.id).reject(rejection.reason)
            for rejection in self.scheduler.take_rejections()
        ]
        previous, self._pending = self._pending, self.runner.run(plan) if plan else None
        start = time.monotonic()
        if previous is None:
            if plan is None and self._progress:
                raise AssertionError("requests wait, but none can run")
            self._step_start = start
            return rejected
        outputs = self._read(previous)
        end = time.monotonic()
        load = step_load(previous.plan, lambda name: self.adapters[name].rank)
        self.cost_model.observe(load, end - self._step_start)
        self._step_start = end
        return rejected + outputs

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(
                f"the engine failed in an earlier step ({self._failure!r}): make a new one"
            ) from self._failure

    def _progress_of(self, request: Request) -> RequestProgress | None:
        """None for a request that ended a step ago, even if its id is used again."""
        progress = self._progress.get(request.id)
        return progress if progress is not None and progress.request is request else None

    def _read(self, result: StepResult) -> list[RequestOutput]:
        """Turns a step's results into outputs; waits for them to arrive."""
        tokens = np.asarray(result.tokens).tolist()
        found = None if result.logprobs is None else HostLogprobs(result.logprobs)
        self._read_prompt_logprobs(result)
        outputs = []
        for index, row in enumerate(result.plan.rows):
            request = row.request
            request.in_flight -= row.samples
            progress = self._progress_of(request)
            if not row.samples or progress is None:
                continue
            logprobs = None
            if request.params.logprobs is not None and found is not None:
                logprobs = found.at(index, tokens[index], self._k(request.params.logprobs))
            output = progress.append(tokens[index], logprobs)
            if output.finished:
                del self._progress[request.id]
                self.scheduler.finish(request)
            outputs.append(output)
        return outputs

    def _read_prompt_logprobs(self, result: StepResult) -> None:
        if result.prompt_logprobs is None:
            return
        found, first = HostLogprobs(result.prompt_logprobs), 0
        for row in result.plan.rows:
            request, progress = row.request, self._progress_of(row.request)
            if request.params.prompt_logprobs is not None and progress is not None:
                k = self._k(request.params.prompt_logprobs)
                end = min(row.start + len(row.tokens), len(request.prompt) - 1)
                for position in range(row.start, end):
                    target = position + 1
                    entry = found.at(first + position - row.start, request.prompt[target], k)
                    progress.set_prompt_logprobs(target, entry)
            first += len(row.tokens)

    def _k(self, asked: int) -> int:
        return self.config.vocab_size if asked == -1 else asked

    def pool_usage(self) -> dict[str, Any]:
        """How the pool's pages are used now: KV, each resident adapter, free."""
        return {
            "pages": self.pool.capacity,
            "page_bytes": self.runner.state.pool.nbytes // self.pool.num_pages,
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
    backend = choose_backend(
        options.kernel_backend,
        dtype=options.dtype,
        layout=_layout(config, options),
        widths=[width for name in LAYER_MODULES for width in config.projection_shape(name)],
    )
    return replace(options, max_model_len=options.max_model_len or longest, kernel_backend=backend)


def _layout(config: ModelConfig, options: EngineConfig) -> PageLayout:
    return PageLayout(config.num_key_value_heads, config.head_dim, options.page_size)


def _keep_compiled_programs(directory: str | None) -> None:
    """Names JAX's persistent cache, unless the user has: a step takes seconds to compile."""
    if directory is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
