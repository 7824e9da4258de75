# SPDX-License-Identifier: Apache-2.0
"""What a client may cost: connections, headers, bodies, parameters, and each tenant's share.

Every limit is checked before the work that it bounds is done.
"""

from dataclasses import dataclass

from server.errors import Invalid
from slora_jax.openai.generation import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All limits, with defaults that no ordinary client meets.

    Attributes:
        max_connections: open connections. At the limit, the connection that has been without a
            whole request for the longest time is closed in favour of the new one.
        max_header_kib: KiB of a request's line and headers.
        max_headers: headers of a request.
        header_timeout_s: seconds in which a request's headers must arrive.
        body_timeout_s: seconds in which a body must arrive.
        send_timeout_s: seconds in which a client must read what has been written for it: some 64
            KiB, or a piece of a large reply.
        max_body_mib: MiB of a request's body.
        max_bodies_mib: MiB of all bodies above 64 KiB whose requests are in progress.
        max_body_values: keys and values in a body's JSON; each token id is one.
        max_prompts: prompts of a request.
        max_messages: messages of a conversation.
        max_stop_strings: stop strings of a request.
        max_stop_chars: characters of a stop string.
        max_stop_token_ids: stop token ids of a request.
        max_queued_requests: choices that may wait for a place in the batch, of all tenants.
        max_tenant_requests: choices that one tenant may have in progress; None: no limit but a
            fair share of the queue.
        tenant_requests_per_minute: requests that one tenant may begin; None: no limit.
        tenant_tokens_per_minute: tokens of prompts and outputs of one tenant; None: no limit.
        request_timeout_s: seconds from a request's arrival to its end; None: no limit.
    """

    max_connections: int = 4096
    max_header_kib: int = 64
    max_headers: int = 128
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    send_timeout_s: float = 60.0
    max_body_mib: float = 16.0
    max_bodies_mib: float = 256.0
    max_body_values: int = 262_144
    max_prompts: int = 2048
    max_messages: int = 4096
    max_stop_strings: int = 64
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 1024
    max_queued_requests: int = 2048
    max_tenant_requests: int | None = None
    tenant_requests_per_minute: float | None = None
    tenant_tokens_per_minute: float | None = None
    request_timeout_s: float | None = None

    def __post_init__(self) -> None:
        least = {"max_queued_requests": 0, "max_stop_strings": 0, "max_stop_token_ids": 0}
        for name in Limits.__dataclass_fields__:
            value = getattr(self, name)
            if value is None:
                continue
            if name in least and value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}")
            if name not in least and value <= 0:
                raise ValueError(f"{name} must be above 0")
        if self.max_bodies_mib < self.max_body_mib:
            raise ValueError("max_bodies_mib must be at least max_body_mib: it is of all bodies")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)

    @property
    def max_bodies_bytes(self) -> int:
        return int(self.max_bodies_mib * 2**20)

    @property
    def max_header_bytes(self) -> int:
        return self.max_header_kib * 2**10

    def check_body(self, body: object) -> None:
        """Raises Invalid if a conversation has more messages than it may have.

        To be called before a body is validated, which takes microseconds for each message.
        """
        messages = body.get("messages") if isinstance(body, dict) else None
        if isinstance(messages, list):
            option = "--max-messages"
            _at_most(len(messages), self.max_messages, "messages", "messages", option)

    def check(self, request: GenerationRequest) -> None:
        """Raises Invalid if a request has more prompts or stop conditions than it may have."""
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        _at_most(len(stops), self.max_stop_strings, "stop", "strings", "--max-stop-strings")
        longest = max(map(len, stops), default=0)
        _at_most(longest, self.max_stop_chars, "stop", "characters", "--max-stop-chars")
        ids = len(request.stop_token_ids)
        option = "--max-stop-token-ids"
        _at_most(ids, self.max_stop_token_ids, "stop_token_ids", "tokens", option)
        _at_most(request.num_prompts, self.max_prompts, "prompt", "prompts", "--max-prompts")


def _at_most(found: int, most: int, field: str, what: str, option: str) -> None:
    if found > most:
        raise Invalid(f"{field} has {found} {what}; at most {most} are taken ({option})", field)
