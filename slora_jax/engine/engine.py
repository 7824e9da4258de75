# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one step at a time."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slora_jax.adapters.host_cache import HostCache
from slora_jax.adapters.manager import AdapterManager, Rescan
from slora_jax.adapters.reads import Reads
from slora_jax.cluster import ALONE, Peers
from slora_jax.config import EngineConfig
from slora_jax.core import (
    EngineDeadError,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    StepPlan,
)
from slora_jax.engine.leading import Followers, LeadingRunner, reading
from slora_jax.engine.output import HostLogprobs, RequestProgress
from slora_jax.engine.output_text import OutputText
from slora_jax.engine.requests import RequestMaker, with_ends
from slora_jax.engine.runner import ModelRunner, StepResult
from slora_jax.engine.sizing import host_bytes, staging_pages
from slora_jax.engine.start import adapter_reader, load_model
from slora_jax.engine.warm_up import warm_up
from slora_jax.pool.allocator import PagePool, PageUse
from slora_jax.scheduling.choice import make_policy
from slora_jax.scheduling.cost_model import CostModel, StepLoad, step_load
from slora_jax.scheduling.scheduler import Scheduler
from slora_jax.stats import EngineStats
from slora_jax.tokenizer import load_tokenizer

# Share of a step for which the host waits for copies to the device, while the device is at work: a
# copy that is done by then is installed a step earlier. With this share, 384 adapters where 96 fit
# gave 90 % of the tokens/s that 48 gave; waiting for as long as the device had work, 77 % (7B, on
# two H100s).
_PATIENCE = 0.3
_WAIT_S = 0.1  # at a time, when nothing can run before some adapter has come


class _Pending(NamedTuple):
    """A step that the device is doing."""

    plan: StepPlan
    result: StepResult
    load: StepLoad


class Engine:
    """Serves one base Llama and many LoRA adapters from one page pool.

    All methods may be called by any thread; `step`, `stream` and `generate` by one at a time.

    Args:
        model: a Hugging Face directory: `config.json`, safetensors, and a tokenizer if prompts are
            to be text.
        adapters: PEFT directories by name; more can be loaded later.
        peers: the other processes of the engine, as `Cluster.join` gave them; each makes a
            `Follower`.
        progress: draw a bar on stderr while weights are loaded.
        **options: the fields of `EngineConfig`.

    Raises:
        ValueError: the model, an adapter or an option is not supported; the message names the
            field and the remedy.
        ClusterError: another process is gone.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        peers: Peers = ALONE,
        progress: bool = False,
        **options: Any,
    ):
        model_dir = Path(model)
        if peers.process_id > 0:
            raise ValueError(
                f"this is process {peers.process_id} of {peers.num_processes}, and process 0 has "
                "the engine: run a Follower here"
            )
        if jax.process_count() != peers.num_processes:
            raise ValueError(
                f"JAX's cluster has {jax.process_count()} processes: join it with Cluster.join, "
                "and give what that returns as peers"
            )
        self.tokenizer = peers.together(lambda: load_tokenizer(model_dir), lambda _: {})
        weights, self.setup = load_model(
            model_dir, EngineConfig(**options), peers, progress=progress
        )
        self.config = with_ends(self.setup.config, self.tokenizer)
        self.options = self.setup.options
        assert self.options.num_pages is not None
        self.pool = PagePool(self.options.num_pages)
        read = adapter_reader(self.setup, model_dir).read
        self._followers: Followers | None = None
        if peers.num_processes == 1:
            self.runner = ModelRunner(weights, self.setup)
        else:
            # Before the followers wait for commands, all of them make the same state.
            self._followers = Followers(peers)
            self.runner = LeadingRunner(weights, self.setup, self._followers)
            read = reading(self._followers, read)
        reads = Reads("adapters", self.options.lora_load_threads, self.options.lora_load_timeout_s)
        self._lock = threading.RLock()  # of all below; not held while the device or a file is read
        self.adapters = AdapterManager(
            self._lock,
            read,
            self.runner,
            self.pool,
            num_slots=self.options.max_loras,
            host=HostCache(
                self.options.max_cpu_loras,
                host_bytes(self.options),
                reads,
            ),
            staging_pages=staging_pages(self.setup),
            requests=lambda: self.scheduler.requests,
            page_size=self.options.page_size,
            reads=reads,
        )
        self.cost_model = CostModel()  # learns from every step what the next ones will take
        step_tokens = self.options.max_num_batched_tokens
        self.scheduler = Scheduler(
            self.pool,
            self.adapters.cache,
            page_size=self.options.page_size,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=step_tokens,
            policy=make_policy(self.options, self.cost_model, step_tokens),
        )
        self._progress: dict[str, RequestProgress] = {}
        self._pending: _Pending | None = None
        self._step_start = 0.0  # when the device began with the pending step
        self._step_seconds = 0.0  # of the last one
        self._num_steps = 0
        self._failure: BaseException | None = None
        self._ids = itertools.count()
        self._requests = RequestMaker(self.config, self.options, self.tokenizer, self.adapters)
        self.load_adapters(adapters or {}, progress=progress)

    # Adapters

    def load_adapter(
        self, name: str, path: str | Path, *, replace: bool = False, pinned: bool = False
    ) -> None:
        """Reads a PEFT directory and makes it servable as `name`.

        It enters the pool when a request needs it. Other requests go on meanwhile.

        Args:
            name: what requests call it.
            path: the directory.
            replace: let the name stand for this one from now on if it stands for another. Requests
                in progress go on with the weights that they began with.
            pinned: as `pin_adapter` does.

        Raises:
            AdapterError: what can't be served as PEFT would, or not be pinned; nothing is changed
                then.
            AdapterUnavailable: one of these: what can't be read now, or not in time.
        """
        self.adapters.load(name, path, replace=replace, pinned=pinned)

    def load_adapters(self, paths: Mapping[str, str | Path], *, progress: bool = False) -> None:
        """Loads PEFT directories by name, several at a time.

        Args:
            paths: directories by name.
            progress: draw a bar on stderr.

        Raises:
            AdapterError: some are refused, each with its reason; the others are loaded then.
        """
        self.adapters.load_all(paths, progress=progress)

    def load_each_adapter(
        self, paths: Mapping[str, str | Path], *, progress: bool = False
    ) -> dict[str, Exception]:
        """The same, but returns why adapters are refused, by name."""
        return self.adapters.load_each(paths, progress=progress)

    def rescan_adapters(self, root: str | Path, *, progress: bool = False) -> Rescan:
        """Brings the adapters up to date with a directory that holds adapters' directories.

        What appeared there is loaded under its directory's name, what was written anew replaced,
        what disappeared unloaded; adapters from elsewhere are left alone. One that is refused does
        not keep the others from being loaded.

        Args:
            root: the directory.
            progress: draw a bar on stderr.

        Raises:
            AdapterError: there is no such directory.
        """
        return self.adapters.rescan(root, progress=progress)

    def pin_adapter(self, name: str) -> None:
        """Brings an adapter into the pool and keeps it there until it is unpinned or unloaded.

        Raises:
            AdapterError: it is unknown, or the pool has no room for it now.
        """
        self.adapters.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Lets an adapter be evicted again.

        Raises:
            AdapterError: it is unknown.
        """
        self.adapters.unpin(name)

    def unload_adapter(self, name: str) -> Future[None]:
        """Forgets an adapter: new requests for it are refused, those in progress end as usual.

        Returns:
            Done when the last of these has ended and the adapter's memory is free, on the host and
            in the pool. Somebody has to go on calling `step` for that.

        Raises:
            AdapterError: it is unknown.
        """
        return self.adapters.unload(name)

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
        params = params or SamplingParams()
        with self._lock:
            return self._add_request(prompt, params, adapter, request_id, priority)

    def _add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        adapter: str | None,
        request_id: str | None,
        priority: int,
    ) -> str:
        self._check_alive()
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
        text = None
        if self.tokenizer is not None:
            text = OutputText(self.tokenizer, request.prompt, params)
        self._progress[request_id] = RequestProgress(request, self.config.eos_token_ids, text)
        self.scheduler.add(request)
        self.adapters.hold(request)
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its pages; None if it isn't in progress."""
        with self._lock:
            progress = self._progress.get(request_id)
            if progress is None:
                return None
            self._end(progress.request)
            output = progress.abort()
        self.adapters.store.tell()
        return output

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
            outputs = self._step()
            self.adapters.store.tell()
            return outputs
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

    def close(self) -> None:
        """Lets the other processes of the engine end, if there are any; nothing runs after that."""
        if self._followers is not None:
            self._followers.close()

    def warm_up(self, *, progress: bool = False) -> None:
        """Compiles what requests will need, so that the first ones need not wait for it.

        The engine must be idle, and have loaded the adapters that it will serve most.

        Args:
            progress: draw a bar on stderr.
        """
        warm_up(self, progress=progress)

    # Inside

    def _step(self) -> list[RequestOutput]:
        loader = self.adapters.loader
        if self._pending is not None and loader.has_copies:
            loader.wait_for_copies(_PATIENCE * self._step_seconds)
        with self._lock:
            outputs = self._failed_loads()
            plan = self.scheduler.schedule()
            for rejection in self.scheduler.take_rejections():
                self.adapters.release(rejection.request)
                progress = self._progress.pop(rejection.request.id)
                outputs.append(progress.reject(rejection.reason))
            previous, self._pending = self._pending, plan and self._dispatch(plan)
            if previous is None:
                self._step_start = time.monotonic()
            stuck = previous is None and plan is None and bool(self._progress)
            copies, reads = stuck and loader.has_copies, stuck and loader.is_reading
            if stuck and not (copies or reads or outputs or loader.has_failures):
                raise AssertionError("requests wait, but none can run")
        if copies:
            loader.wait_for_copies(_WAIT_S)
        elif reads:
            loader.wait_for_reads(_WAIT_S)
        if previous is None:
            return outputs
        jax.block_until_ready(previous.result.tokens)
        with self._lock:
            outputs += self._read(previous)
            end = time.monotonic()
            self._step_seconds = end - self._step_start
            self.cost_model.observe(previous.load, self._step_seconds)
            self._step_start = end
        return outputs

    def _dispatch(self, plan: StepPlan) -> _Pending:
        result = self.runner.run(plan, self.adapters.loader.taken)
        self._num_steps += 1
        return _Pending(plan, result, step_load(plan, self.adapters.rank_of))

    def _failed_loads(self) -> list[RequestOutput]:
        """Ends the requests whose adapters could not be read again."""
        outputs = []
        for adapter_id, error in self.adapters.loader.poll().items():
            if adapter_id in self.adapters.cache:
                continue
            for request in [r for r in self.scheduler.waiting if r.adapter_id == adapter_id]:
                outputs.append(self._progress[request.id].reject(f"the adapter is lost: {error}"))
                self._end(request)
        return outputs

    def _end(self, request: Request) -> None:
        """Forgets a request and frees what it holds."""
        del self._progress[request.id]
        self.scheduler.finish(request)
        self.adapters.release(request)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(
                f"the engine failed in an earlier step ({self._failure!r}): make a new one"
            ) from self._failure

    def _progress_of(self, request: Request) -> RequestProgress | None:
        """None for a request that ended a step ago, even if its id is used again."""
        progress = self._progress.get(request.id)
        return progress if progress is not None and progress.request is request else None

    def _read(self, step: _Pending) -> list[RequestOutput]:
        """Turns a step's results into outputs; waits for them to arrive."""
        result = step.result
        tokens = np.asarray(result.tokens).tolist()
        found = None if result.logprobs is None else HostLogprobs(result.logprobs)
        self._read_prompt_logprobs(step)
        outputs = []
        for index, row in enumerate(step.plan.rows):
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
                self._end(request)
            outputs.append(output)
        return outputs

    def _read_prompt_logprobs(self, step: _Pending) -> None:
        result = step.result
        if result.prompt_logprobs is None:
            return
        found, first = HostLogprobs(result.prompt_logprobs), 0
        for row in step.plan.rows:
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
        with self._lock:
            return {
                "pages": self.pool.capacity,
                "page_bytes": self.runner.state.pool.nbytes // self.pool.num_pages,
                "kv": self.pool.num_used(PageUse.KV),
                "adapters": {", ".join(one.names): one.pages for one in self.adapters.residents()},
                "free": self.pool.num_free,
            }

    def stats(self) -> EngineStats:
        """Requests, pages and adapters now; the times of loads are handed out once.

        Raises:
            ClusterError: another process of the engine is gone.
        """
        if self._followers is not None:
            self._followers.check()  # an idle engine would not notice
        with self._lock:
            scheduler, cache = self.scheduler, self.adapters.cache
            return EngineStats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                running_adapters=_adapters_of(scheduler.running),
                waiting_adapters=_adapters_of(scheduler.waiting),
                pages=self.pool.capacity,
                kv_pages=self.pool.num_used(PageUse.KV),
                free_pages=self.pool.num_free,
                residents=self.adapters.residents(),
                loaded=len(self.adapters.store),
                in_host_memory=len(self.adapters.host),
                hits=cache.num_hits,
                misses=cache.num_misses,
                evictions=cache.num_evictions,
                preemptions=scheduler.num_preemptions,
                steps=self._num_steps,
                load_seconds=tuple(self.adapters.loader.take_load_seconds()),
            )

    def check(self) -> None:
        """Raises AssertionError if a page, a slot or an adapter is lost or shared by mistake."""
        with self._lock:
            self.scheduler.check(self.options.max_num_seqs, self.options.max_loras)
            self.adapters.check()


def _adapters_of(requests: Iterable[Request]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.adapter for r in requests if r.adapter is not None))
