# SPDX-License-Identifier: Apache-2.0
"""From sampled tokens to what the caller sees: text, stop conditions, log-probabilities."""

import numpy as np

from slora_jax.core import (
    NO_TOKEN,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Request,
    RequestOutput,
)
from slora_jax.engine.output_text import OutputText
from slora_jax.engine.sampler import Logprobs


class RequestProgress:
    """One request's output as it grows.

    Args:
        request: whose `output` gets the tokens.
        eos_ids: the model's end-of-sequence tokens.
        text: None without a tokenizer: it stays empty.
    """

    def __init__(self, request: Request, eos_ids: tuple[int, ...], text: OutputText | None):
        self.request = request
        self._eos_ids = eos_ids
        self._text = text
        self._prompt = list(request.prompt)  # the outputs'; the engine goes on reading its own
        params = request.params
        self._logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None for _ in request.prompt]

    def append(self, token: int, logprobs: PositionLogprobs | None) -> RequestOutput:
        """Takes the next token; the result says whether the request is finished by it."""
        if token == NO_TOKEN:
            who = f"adapter {self.request.adapter!r}" if self.request.adapter else "base model"
            overflow = f"the logits are not finite: the {who} overflows in this dtype"
            return self._output([], FinishReason.ERROR, overflow)
        request, params = self.request, self.request.params
        request.output.append(token)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if token in request.stop_ids and len(request.output) > params.min_tokens:
            reason = FinishReason.STOP
            stop_reason = None if token in self._eos_ids and not params.ignore_eos else token
        elif len(request.output) >= request.max_output:
            reason = FinishReason.LENGTH
        stop = self._take_text(token, reason)
        if stop is not None:
            reason, stop_reason = FinishReason.STOP, stop
        return self._output([token], reason, stop_reason)

    def abort(self) -> RequestOutput:
        """Ends the request where it stands."""
        return self._output([], FinishReason.ABORT, None)

    def reject(self, why: str) -> RequestOutput:
        """Ends a request that the scheduling policy turned away, or whose adapter is lost."""
        return self._output([], FinishReason.REJECTED, why)

    def set_prompt_logprobs(self, position: int, logprobs: PositionLogprobs) -> None:
        """Log-probabilities of the prompt token at `position`; the first value counts."""
        assert self._prompt_logprobs is not None
        if self._prompt_logprobs[position] is None:
            self._prompt_logprobs[position] = logprobs

    def _take_text(self, token: int, reason: FinishReason | None) -> str | None:
        """Adds a token's text, unless it ends the output; returns the stop string that this does.

        The last text comes out only in the end, and may hold a stop string as well.
        """
        if self._text is None:
            return None
        looks = len(self.request.output) > self.request.params.min_tokens
        if reason is not FinishReason.STOP:
            self._text.append(token)
            if looks and (stop := self._text.cut_at_stop()) is not None:
                return stop
        if reason is None:
            return None
        self._text.flush()
        return self._text.cut_at_stop() if looks else None

    def _output(
        self, tokens: list[int], reason: FinishReason | None, stop_reason: int | str | None
    ) -> RequestOutput:
        request = self.request
        text, fresh = ("", "") if self._text is None else self._text.take(reason is not None)
        return RequestOutput(
            request_id=request.id,
            adapter=request.adapter,
            prompt_token_ids=self._prompt,
            token_ids=list(request.output),
            text=text,
            new_token_ids=tokens,
            new_text=fresh,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=_copy(self._logprobs),
            prompt_logprobs=_copy(self._prompt_logprobs),
            queue_seconds=request.queue_seconds,
        )


def _copy[T](items: list[T] | None) -> list[T] | None:
    return None if items is None else list(items)


class HostLogprobs:
    """A step's log-probabilities, once they have reached the host."""

    def __init__(self, found: Logprobs):
        self._top, self._ids, self._chosen, self._rank = (np.asarray(field) for field in found)

    def at(self, position: int, token: int, k: int) -> PositionLogprobs:
        """The k most likely tokens of a position, and the one that is there."""
        ids, top = self._ids[position, :k].tolist(), self._top[position, :k].tolist()
        entries = {
            i: Logprob(value, rank) for rank, (i, value) in enumerate(zip(ids, top, strict=True), 1)
        }
        if token not in entries:
            entries[token] = Logprob(float(self._chosen[position]), int(self._rank[position]))
        return entries
