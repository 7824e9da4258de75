# SPDX-License-Identifier: Apache-2.0
"""From what a caller asks to a request that is sure to be served, or an error that says why not."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slora_jax.adapters.manager import AdapterManager
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.core import Request, RequestError, SamplingParams, check_prompt_length
from slora_jax.engine.packing import MOST_BANNED
from slora_jax.tokenizer import Tokenizer


def with_ends(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Adds the tokenizer's end of sequence to the model's: users change the one they know of."""
    end = None if tokenizer is None else tokenizer.eos_id
    if end is None or end in config.eos_token_ids or end >= config.vocab_size:
        return config
    return replace(config, eos_token_ids=(*config.eos_token_ids, end))


class RequestMaker:
    """Checks requests against the model, the adapters and the pool.

    Args:
        config: the model's shape.
        options: the engine's; `max_model_len` is set.
        tokenizer: None if prompts are token ids only.
        adapters: those that can be asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: EngineConfig,
        tokenizer: Tokenizer | None,
        adapters: AdapterManager,
    ):
        assert options.max_model_len is not None
        self._config = config
        self._options = options
        self._max_model_len = options.max_model_len
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._random = random.Random(options.seed)

    def make(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        adapter: str | None,
    ) -> Request:
        """A request whose tokens, all in all, fit the model and the pool.

        Raises:
            RequestError: it can never be served; the message names the field and the remedy.
        """
        store = self._adapters.store
        if adapter is not None and adapter not in store:
            raise RequestError(
                f"the adapter {adapter!r} does not exist: {store.known()}", "adapter"
            )
        tokens = self._encode(prompt)
        room = self._max_model_len - len(tokens)
        self._check_logprobs(params)
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        request = Request(
            id=request_id,
            prompt=tokens,
            params=params,
            adapter=adapter,
            adapter_id=None if adapter is None else store[adapter].version.id,
            stop_ids=self._stop_ids(params),
            seed=random.Random(seed % 2**64).getrandbits(31),
            max_output=min(params.max_tokens or room, room),
        )
        self._fit_pool(request)
        return request

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "the model has no tokenizer: give the prompt as a list of token ids", "prompt"
                )
            try:
                prompt = self._tokenizer.encode(prompt)
            except (TypeError, ValueError) as error:  # a lone surrogate, say
                raise RequestError(f"the prompt is no text: {error}", "prompt") from error
        if not len(prompt):
            raise RequestError("the prompt is empty", "prompt")
        check_prompt_length(len(prompt), self._max_model_len)
        vocab = self._config.vocab_size
        if {*map(type, prompt)} == {int} and 0 <= min(prompt) <= max(prompt) < vocab:
            return list(prompt)  # nothing to look at one by one: long prompts come between steps
        for token in prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
                raise RequestError(
                    f"the prompt holds {token!r}; token ids are integers from 0 to {vocab - 1}",
                    "prompt",
                )
        return [int(token) for token in prompt]

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end the output."""
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids", "stop")
        for token in params.stop_token_ids:
            if not 0 <= token < self._config.vocab_size:
                raise RequestError(
                    f"stop_token_ids holds {token}; token ids are below {self._config.vocab_size}",
                    "stop_token_ids",
                )
        eos = () if params.ignore_eos else self._config.eos_token_ids
        ids = frozenset((*params.stop_token_ids, *eos))
        if params.min_tokens and len(ids) > MOST_BANNED:
            raise RequestError(
                f"min_tokens with {len(ids)} stop tokens; at most {MOST_BANNED}", "stop_token_ids"
            )
        return ids

    def _check_logprobs(self, params: SamplingParams) -> None:
        most, vocab = self._options.max_logprobs, self._config.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is None:
                continue
            if most != -1 and not 0 <= asked <= most:
                raise RequestError(
                    f"{name} is {asked}: ask for at most {most}, or raise max_logprobs",
                    name,
                )
            if asked > vocab:
                raise RequestError(f"{name} is {asked}; the model has {vocab} tokens", name)

    def _fit_pool(self, request: Request) -> None:
        """Cuts `max_output` to what the pool has room for, as to the model's length.

        Raises:
            RequestError: the prompt does not fit, even alone in the pool with what is pinned.
        """
        page_size = self._options.page_size
        room = self._adapters.room_for(request.adapter_id)
        lora = self._adapters.pages_needed(request) - request.most_pages(page_size)
        # The last token is never read: it needs no room.
        fitting = (room - lora) * page_size + 1 - len(request.prompt)
        if fitting >= 1:
            request.max_output = min(request.max_output, fitting)
            return
        pinned = self._adapters.capacity - room
        beside = f" beside {pinned} of pinned adapters" if pinned else ""
        raise RequestError(
            f"the request needs {-(-len(request.prompt) // page_size)} pages for its prompt of "
            f"{len(request.prompt)} tokens and {lora} for its adapter, the pool has {room}{beside}"
            f": raise num_pages{', unpin adapters' if pinned else ''} or shorten the prompt",
            "prompt",
        )
