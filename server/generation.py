# SPDX-License-Identifier: Apache-2.0
"""One HTTP request's choices while the engine works on them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.errors import HttpError
from server.messages import Delta
from slora_jax.core import PositionLogprobs, RequestOutput


@dataclass(slots=True)
class Choice:
    """What has come of one choice, and when.

    Attributes:
        output: all that has come; its `new_*` fields are what nobody has taken yet.
        first_token, last_token: when tokens came, on the monotonic clock.
    """

    output: RequestOutput
    first_token: float | None = None
    last_token: float | None = None


class Generation:
    """Collects the outputs of several choices until somebody takes them.

    What comes while nobody looks is joined: a slow client gets fewer and larger pieces, and what is
    kept for it is bounded by the output itself.

    Args:
        ids: the engine's names of the choices, in order.
        prompts: their token ids.
        adapters: what they asked for.
        arrival: when the request came, on the monotonic clock.
    """

    def __init__(
        self,
        ids: Sequence[str],
        prompts: Sequence[list[int]],
        adapters: Sequence[str | None],
        arrival: float,
    ) -> None:
        self.ids = tuple(ids)
        self.arrival = arrival
        self.choices = [
            Choice(_nothing(name, prompt, adapter))
            for name, prompt, adapter in zip(ids, prompts, adapters, strict=True)
        ]
        self._fresh: dict[int, None] = {}  # choices with something to take, in order
        self._unfinished = len(self.choices)
        self._error: HttpError | None = None
        self._news = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether everything has come."""
        return self._unfinished == 0

    @property
    def num_unfinished(self) -> int:
        """Choices that the engine still works on."""
        return 0 if self.failed else self._unfinished

    @property
    def num_tokens(self) -> int:
        """Tokens that have come."""
        return sum(len(choice.output.token_ids) for choice in self.choices)

    @property
    def has_begun(self) -> bool:
        """Whether something has come."""
        return any(c.output.token_ids or c.output.finished for c in self.choices)

    @property
    def exhausted(self) -> bool:
        """Whether everything has come and has been taken."""
        return self.finished and not self._fresh

    @property
    def failed(self) -> bool:
        """Whether it ends with an error."""
        return self._error is not None

    @property
    def outputs(self) -> list[RequestOutput]:
        return [choice.output for choice in self.choices]

    def add(self, index: int, delta: Delta) -> None:
        """Takes what a step gave to the choice `index`."""
        output = self.choices[index].output
        output.token_ids += delta.tokens
        output.new_token_ids += delta.tokens
        output.text += delta.text
        output.new_text += delta.text
        if delta.logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += delta.logprobs
        if delta.queue_seconds is not None:
            output.queue_seconds = delta.queue_seconds
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            self._unfinished -= 1
        self._fresh[index] = None
        self._news.set()

    def add_prompt_logprobs(self, index: int, positions: Sequence[PositionLogprobs | None]) -> None:
        """Takes the next ones of the prompt of the choice `index`."""
        output = self.choices[index].output
        output.prompt_logprobs = output.prompt_logprobs or []
        output.prompt_logprobs += positions

    def fail(self, error: HttpError) -> None:
        """Ends it with an error, for whoever waits."""
        self._error = self._error or error
        self._news.set()

    async def next(self) -> list[tuple[int, RequestOutput]]:
        """Waits for something new and takes it: choices, and what they have now.

        These outputs go on growing: read them, or take a copy, before anything else is awaited.

        Raises:
            HttpError: why nothing more will come, once all that has come is taken.
        """
        await self._news.wait()
        if not self._fresh:
            assert self._error is not None
            raise self._error
        taken = []
        for index in self._fresh:
            choice = self.choices[index]
            taken.append((index, choice.output))
            choice.output = replace(choice.output, new_token_ids=[], new_text="")
        self._fresh.clear()
        if self._error is None:
            self._news.clear()
        return taken

    async def wait(self) -> list[RequestOutput]:
        """Waits until all choices are finished.

        Raises:
            HttpError: why one will not be.
        """
        while not self.finished:
            await self.next()
        return self.outputs


def _nothing(request_id: str, prompt: list[int], adapter: str | None) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        adapter=adapter,
        prompt_token_ids=prompt,
        token_ids=[],
        text="",
        new_token_ids=[],
        new_text="",
    )
