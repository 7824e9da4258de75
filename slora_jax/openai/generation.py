# SPDX-License-Identifier: Apache-2.0
"""The fields that completions and chat completions share, and those that are refused or ignored."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slora_jax.core import RequestError, SamplingParams

# Fields that would change the result, so they are refused unless they hold their neutral value:
# field -> (neutral value, remedy). null is always neutral.
REFUSED: Mapping[str, tuple[object, str]] = {
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
}

# Fields that clients send and that have no effect on the result here. So have all that nobody
# knows: vLLM ignores them too.
IGNORED: Mapping[str, str] = {
    "user": "no accounts are kept",
    "metadata": "responses are not stored",
    "store": "responses are not stored",
    "service_tier": "there is one",
    "session_id": "requests do not depend on each other",
    "safety_identifier": "no accounts are kept",
    "prompt_cache_key": "nothing is cached between requests",
    "cache_salt": "nothing is cached between requests",
    "stream_interval": "tokens are sent as they come",
}


def refuse(body: Mapping[str, Any], refused: Mapping[str, tuple[object, str]]) -> None:
    """Raises RequestError if a field that is not implemented has another than its neutral value."""
    for name, (neutral, remedy) in refused.items():
        if body.get(name) not in (None, neutral):
            raise RequestError(f"{name} is not supported: {remedy}", name)


ModelName = Annotated[str, Field(max_length=1024)]  # errors and logs repeat it
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # larger ones mean nothing to anybody


class StreamOptions(BaseModel):
    """What a stream carries beside the tokens.

    Attributes:
        include_usage: a last chunk without choices says how many tokens there were.
        continuous_usage_stats: every chunk says how many there have been so far (vLLM).
    """

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """What to generate from, how to choose tokens, when to stop; names and defaults are vLLM's.

    Types are strict: "16", 16.0 or true is no integer. `SamplingParams` checks the ranges. null
    means the default, except where it means something else.

    Attributes:
        model: an adapter's name, the base model's, or `base:adapter`.
        lora_path: an adapter's name, beside the base model's in `model`, for all prompts, or one
            or null for each (SGLang).
        max_tokens: null: as many as the model's length allows, as in vLLM.
        prompt_logprobs: of that many most likely tokens at each position of the prompt.
        request_id: becomes part of the response's id.
        priority: lower goes first, under the scheduling policy "priority".
        return_tokens_as_token_ids: name tokens `token_id:N` in `logprobs`.
    """

    model_config = ConfigDict(strict=True)

    refused: ClassVar[Mapping[str, tuple[object, str]]] = REFUSED
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    model: ModelName
    lora_path: ModelName | Annotated[list[ModelName | None], Field(fail_fast=True)] | None = Field(
        None, description="an adapter's name, or a list of one or null for each prompt"
    )
    n: int = Field(1, ge=1, le=128)
    seed: Int64 | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Int64 = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Annotated[list[str], Field(fail_fast=True)] = Field(
        [], description="a string or a list of strings"
    )
    stop_token_ids: Annotated[list[Int64], Field(fail_fast=True)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: Int64 | None = None
    min_tokens: Int64 = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Int64 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: str | None = Field(None, max_length=256)
    priority: Int64 = 0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, body: Any) -> Any:
        """Refuses what is not implemented, and takes null for the default."""
        if not isinstance(body, dict):
            return body
        refuse(body, cls.refused)
        return {k: v for k, v in body.items() if v is not None or k == "max_tokens"}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options need stream: true", "stream_options")
        return self

    @property
    def num_prompts(self) -> int:
        """Each has `n` choices."""
        return 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def includes_continuous_usage(self) -> bool:
        """Whether every chunk of a stream says the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def sampling_params(self) -> SamplingParams:
        """What the engine is asked for the first answer; for others see `SamplingParams.of_choice`.

        Raises:
            RequestError: a value is out of its range.
        """
        own = type(self).model_fields
        values = {f.name: getattr(self, f.name) for f in fields(SamplingParams) if f.name in own}
        return SamplingParams(**values | self._overrides())

    def _overrides(self) -> dict[str, Any]:
        """Parameters that are not simply the field of the same name."""
        return {}
