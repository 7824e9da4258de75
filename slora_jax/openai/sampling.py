# SPDX-License-Identifier: Apache-2.0
"""The sampling fields that completions and chat completions share, and those that are refused."""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slora_jax.core import RequestError, SamplingParams

# Fields that would change the result, so they are refused unless they hold their neutral value:
# field -> (neutral value, remedy). null is always neutral. Fields in neither this table nor the
# model have no effect on the result here (`user`, `session_id`, ...) and are ignored, as in vLLM.
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "suffix": ("", "text is generated after the prompt only"),
    "logit_bias": ({}, "only penalties change the logits"),
    "response_format": ({"type": "text"}, "the output is not constrained"),
    "structured_outputs": ({}, "the output is not constrained"),
    "guided_json": (None, "the output is not constrained"),
    "guided_regex": (None, "the output is not constrained"),
    "guided_choice": (None, "the output is not constrained"),
    "guided_grammar": (None, "the output is not constrained"),
    "logits_processors": ([], "only penalties change the logits"),
    "allowed_token_ids": (None, "all tokens are allowed"),
    "bad_words": ([], "all words are allowed"),
    "use_beam_search": (False, "use n and seed for several answers"),
    "length_penalty": (1, "it belongs to beam search"),
    "prompt_embeds": (None, "send the prompt as text or token ids"),
    "truncate_prompt_tokens": (None, "shorten the prompt before sending it"),
    "logprob_token_ids": ([], "use logprobs"),
    "spaces_between_special_tokens": (True, "the tokenizer decides"),
    "kv_transfer_params": (None, "prefill and decoding share one pool"),
    "vllm_xargs": ({}, "there are no further arguments"),
    "lora_path": (None, "name the adapter in 'model'"),
}


class SamplingFields(BaseModel):
    """How to choose tokens and when to stop; names and defaults are vLLM's.

    Types are strict: "16", 16.0 or true is no integer. `SamplingParams` checks the ranges. null
    means the default, except where it means something else.
    """

    model_config = ConfigDict(strict=True)

    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | list[str] = Field([], description="a string or a list of strings")
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, body: Any) -> Any:
        """Refuses what is not implemented, and takes null for the default."""
        if not isinstance(body, dict):
            return body
        for name, (neutral, remedy) in _UNSUPPORTED.items():
            if body.get(name) not in (None, neutral):
                raise RequestError(f"{name} is not supported: {remedy}", name)
        return {k: v for k, v in body.items() if v is not None or k == "max_tokens"}

    def _sampling_params(self, choice: int, **overrides: Any) -> SamplingParams:
        """What the engine is asked for the `choice`-th answer to a prompt.

        With a seed, each of `n` answers has its own: `seed + choice`, as in vLLM.

        Args:
            choice: from 0 to `n - 1`.
            overrides: parameters that are not simply the field of the same name.

        Raises:
            RequestError: a value is out of its range.
        """
        own = type(self).model_fields
        values = {f.name: getattr(self, f.name) for f in fields(SamplingParams) if f.name in own}
        if self.seed is not None:
            values["seed"] = self.seed + choice
        return SamplingParams(**values | overrides)
