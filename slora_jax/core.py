# SPDX-License-Identifier: Apache-2.0
"""The engine's vocabulary: requests, what is planned for a step, and what comes out.

Plain Python over plain data: the scheduler and its tests run on this without JAX.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

FROM_DEVICE = -1  # a token id that the host doesn't know yet: the slot's last sampled token
NO_TOKEN = -2  # instead of a token where the logits are not finite
_INTEGERS = (
    "max_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "stop_token_ids",
    "logprobs",
    "prompt_logprobs",
)
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_GREEDY_EPS = 1e-5  # temperatures below it would overflow the logits they divide


class RequestError(ValueError):
    """A request that can't be served as asked; the message names the field and the remedy."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output. Clients know it by its code and some of its words."""

    code = "context_length_exceeded"  # OpenAI's


def check_prompt_length(length: int, max_model_len: int) -> None:
    """Raises PromptTooLongError unless there is room for so many tokens and one of output."""
    if length >= max_model_len:
        raise prompt_too_long(str(length), max_model_len)


def prompt_too_long(length: str, max_model_len: int) -> PromptTooLongError:
    """The error of a prompt whose number of tokens is `length`, in words perhaps."""
    return PromptTooLongError(
        f"the prompt has {length} tokens; with at least one token of output that is more than "
        f"the maximum context length, max_model_len {max_model_len}",
        "prompt",
    )


class OverloadedError(RequestError):
    """A request was turned away for no fault of its own, and may be tried again. HTTP's 503."""


class EngineDeadError(RuntimeError):
    """A step failed, and with it what the engine knew of its requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names, meanings and defaults are vLLM's.

    Attributes:
        max_tokens: most tokens to generate; None: as many as the model's length allows.
        min_tokens: end-of-sequence and stop token ids can't be sampled before that many tokens.
        temperature: 0 is greedy.
        top_k: 0 or -1: all tokens.
        top_p: smallest set of most likely tokens whose probability reaches it.
        min_p: least probability relative to the most likely token's.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or the output (CTRL, arXiv 1909.05858). 1: off.
        presence_penalty: subtracted once from tokens already generated.
        frequency_penalty: subtracted for each time a token was generated.
        seed: the same seed, prompt and adapter give the same tokens in any batch. -1: None.
        stop: strings that end the output; not part of it unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end the output, beside the model's end of sequence.
        ignore_eos: go on past the model's end of sequence.
        logprobs: log-probabilities of that many most likely tokens at each output position, and of
            the sampled one; of the model's own distribution, before penalties and temperature.
        prompt_logprobs: the same for each prompt position but the first.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_types()
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        checks = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "min_tokens": (
                0 <= self.min_tokens <= (self.max_tokens or self.min_tokens),
                "at least 0 and at most max_tokens",
            ),
            "temperature": (0 <= self.temperature <= 100, "from 0 to 100"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 or -1 for all tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 2, "above 0 and at most 2"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "stop": (all(self.stop), "non-empty strings"),
            "logprobs": (self.logprobs is None or self.logprobs >= -1, "at least 0, or -1 for all"),
            "prompt_logprobs": (
                self.prompt_logprobs is None or self.prompt_logprobs >= -1,
                "at least 0, or -1 for all",
            ),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise RequestError(f"{name} must be {allowed}, got {getattr(self, name)!r}", name)

    def _check_types(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and (not isinstance(one, int) or isinstance(one, bool)):
                    raise RequestError(f"{name} must be an integer, got {one!r}", name)
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise RequestError(f"{name} must be a number, got {value!r}", name)

    def of_choice(self, choice: int) -> "SamplingParams":
        """Of the `choice`-th answer to a prompt: with a seed, `seed + choice`, as in vLLM."""
        if self.seed is None or choice == 0:
            return self
        return replace(self, seed=self.seed + choice)

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_EPS

    @property
    def penalized(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's length
    ABORT = "abort"
    ERROR = "error"  # no distribution; `stop_reason` says why
    # By the scheduling policy, or its adapter can't be read any more: HTTP's 503.
    REJECTED = "rejected"  # `stop_reason` says why


class Logprob(NamedTuple):  # there may be a million: the garbage collector looks at no tuple twice
    """One token's log-probability at one position; rank 1 is the most likely token."""

    logprob: float
    rank: int


# The candidates of one position, by token id: the most likely ones and the token that was there.
PositionLogprobs = Mapping[int, Logprob]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request as the scheduler sees it.

    `in_flight` tokens were sampled by steps whose results the host has not read yet; they count as
    known wherever only their number matters. `adapter` is what was asked for, `adapter_id` the
    weights that this name stood for then: it may stand for others since.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    adapter: str | None = None
    adapter_id: str | None = None
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    max_output: int = 16
    priority: int = 0  # lower goes first
    arrival: float = 0.0  # seconds on the scheduler's clock; it sets this
    admitted: float | None = None  # when it first got a place in the batch, on the same clock
    overtaken: int = 0  # requests admitted past this one while it waited in vain
    output: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in pages, once dispatched steps end
    in_flight: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None  # line of the device's page table; None while waiting
    num_preemptions: int = 0

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited for its first place in the batch; None: it still does."""
        return None if self.admitted is None else self.admitted - self.arrival

    @property
    def num_output(self) -> int:
        return len(self.output) + self.in_flight

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_output

    @property
    def num_to_compute(self) -> int:
        """Tokens that must go through the model before the next one can be sampled."""
        num_output = len(self.output) + self.in_flight
        if num_output >= self.max_output:
            return 0
        return len(self.prompt) + num_output - self.num_computed

    def most_pages(self, page_size: int) -> int:
        """KV pages that it needs if it gets all its output; the last token's are never read."""
        return -(-(len(self.prompt) + self.max_output - 1) // page_size)

    def tokens_from(self, start: int, length: int) -> tuple[int, ...]:
        """Token ids of `length` positions; FROM_DEVICE for those in flight."""
        if length == 1 and start >= len(self.prompt):  # a decode, as nearly all are
            index = start - len(self.prompt)
            return (self.output[index] if index < len(self.output) else FROM_DEVICE,)
        prompt = self.prompt[start : start + length]
        first = max(start - len(self.prompt), 0)
        known = prompt + self.output[first : first + length - len(prompt)]
        return (*known, *[FROM_DEVICE] * (length - len(known)))


class RowPlan(NamedTuple):  # made in a third of the time of a frozen dataclass
    """One request's part of a step: its tokens from position `start` on."""

    request: Request
    slot: int
    adapter_slot: int | None  # None: the base model
    start: int
    tokens: tuple[int, ...]  # FROM_DEVICE for one that is still in flight
    samples: bool  # the last token's logits give the request's next token
    position: int  # of that next token in the output


@dataclass(frozen=True, slots=True)
class Install:
    """An adapter's pages to be written before the step."""

    adapter_id: str
    adapter_slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request that the scheduling policy turns away, and why, for whoever sent it."""

    request: Request
    reason: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler wants of the next step.

    Rows are sorted by adapter slot, the base model's last: rows of one adapter are one segment.
    `started` requests got their slot, new or again, in this step.
    """

    rows: tuple[RowPlan, ...]
    page_updates: tuple[tuple[int, int, int], ...]  # slot, column, page
    installs: tuple[Install, ...]
    started: tuple[Request, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def decode_only(self) -> bool:
        return all(len(row.tokens) == 1 for row in self.rows)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All that a request has given so far, the caller's own; `new_*` is what this step added."""

    request_id: str
    adapter: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    new_token_ids: list[int]
    new_text: str
    finish_reason: FinishReason | None = None
    # The stop token or string, None for end of sequence; what went wrong, of ERROR and REJECTED.
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # the first position has none
    queue_seconds: float | None = None  # before it first ran

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
