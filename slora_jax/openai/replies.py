# SPDX-License-Identifier: Apache-2.0
"""What the responses to completions and to chat completions have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import BaseModel

from slora_jax.core import FinishReason, RequestOutput


class Usage(BaseModel):
    """Tokens in and out. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(slots=True)
class Tokens:
    """Counts the tokens of one request's choices as they come.

    Args:
        n: choices of each prompt; the first ones are the first prompt's.
    """

    n: int
    _prompts: dict[int, int] = field(default_factory=dict)  # by the prompt's index
    _outputs: dict[int, int] = field(default_factory=dict)  # by the choice's index

    def count(self, index: int, output: RequestOutput) -> None:
        """Takes note of how far the choice `index` has come."""
        self._prompts[index // self.n] = len(output.prompt_token_ids)
        self._outputs[index] = len(output.token_ids)

    def usage(self, index: int | None = None) -> Usage:
        """Of all choices, or of one."""
        prompts: Mapping[int, int] = self._prompts
        outputs: Mapping[int, int] = self._outputs
        if index is not None:
            prompts, outputs = {0: prompts[index // self.n]}, {0: outputs[index]}
        given, made = sum(prompts.values()), sum(outputs.values())
        return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)


def as_one_piece(outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
    """Outputs where all is new: what a response that does not stream is written from."""
    return [replace(one, new_token_ids=one.token_ids, new_text=one.text) for one in outputs]


def without_generated(output: RequestOutput) -> RequestOutput:
    """The output of a request that only scores its prompt: what was sampled is not shown."""
    return replace(
        output,
        token_ids=[],
        text="",
        new_token_ids=[],
        new_text="",
        logprobs=None if output.logprobs is None else [],
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
    )
