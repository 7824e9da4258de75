# SPDX-License-Identifier: Apache-2.0
"""What the front end and the engine's process say to each other, as MessagePack.

The front end opens a socket and starts the process; each answer names the request or the call that
it belongs to. Token ids, texts and log-probabilities are those of the last step only.
"""

from typing import Any

import msgspec

from slora_jax.cluster import Cluster
from slora_jax.core import FinishReason, Logprob, SamplingParams
from slora_jax.stats import EngineStats


class Launch(msgspec.Struct, frozen=True):
    """The first line of the process's standard input, as JSON.

    Attributes:
        address: of the front end's socket.
        model: Hugging Face directory.
        options: fields of `EngineConfig`.
        adapters: PEFT directories by name.
        pinned: names of those to pin.
        restart: an adapter that cannot be loaded does not keep the engine from starting.
        progress: draw bars on stderr.
        quiet: no messages on stderr.
        cluster: where this is process 0 of several; it holds their secret.
    """

    address: str
    model: str
    options: dict[str, Any]
    adapters: dict[str, str]
    pinned: list[str]
    restart: bool
    progress: bool
    quiet: bool
    cluster: Cluster | None = None


# To the engine


class Generate(msgspec.Struct, frozen=True, tag=True):
    """A prompt, with the ids of its choices and the parameters of the first one."""

    ids: list[str]
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    priority: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for these any more."""

    ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Done`."""

    call: int
    name: str
    path: str
    replace: bool
    pinned: bool


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Done`."""

    call: int
    name: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


type ToEngine = Generate | Abort | LoadAdapter | UnloadAdapter | Stop


# To the front end


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has been made, and its adapters are loaded.

    Attributes:
        max_loras: most adapters in the pool.
        device: in words.
        failed: adapters that could not be loaded again after a restart, and why.
    """

    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    page_size: int
    num_pages: int
    page_bytes: int
    max_loras: int
    device: str
    failed: dict[str, str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not be made, or a step failed; the process ends."""

    message: str


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """The next log-probabilities of a choice's prompt, a part of them. All precede its tokens."""

    id: str
    positions: list[dict[int, Logprob] | None]


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice. `queue_seconds` comes with the first."""

    id: str
    tokens: list[int]
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    queue_seconds: float | None


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step gave."""

    deltas: list[Delta]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that the engine does not take."""

    id: str
    message: str
    param: str | None


class Done(msgspec.Struct, frozen=True, tag=True):
    """A call has ended; `error` says why in vain, and `unavailable` whether it may help to wait."""

    call: int
    error: str | None
    unavailable: bool = False


class Report(msgspec.Struct, frozen=True, tag=True):
    """How the engine is, several times a second."""

    stats: EngineStats


type FromEngine = Ready | Failed | PromptLogprobs | Outputs | Refused | Done | Report

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine.__value__).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine.__value__).decode
