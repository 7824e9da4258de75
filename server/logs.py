# SPDX-License-Identifier: Apache-2.0
"""Structured logs: a line of JSON for each request, without what was said in it."""

import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from server.generation import Generation
from slora_jax.openai.generation import GenerationRequest

logger = logging.getLogger("slora_jax.server")


@dataclass(slots=True)
class RequestRecord:
    """What the log will say of one HTTP request.

    Attributes:
        request_id: sent back as `X-Request-Id`.
        arrival: on the monotonic clock.
        fields: of the line.
    """

    request_id: str
    arrival: float
    fields: dict[str, Any] = field(default_factory=dict)

    def describe(self, request: GenerationRequest, *, with_content: bool) -> None:
        """Takes note of what is asked; with all that is said in it only if told so."""
        self.fields |= {"model": request.model, "stream": request.stream, "n": request.n}
        if with_content:
            self.fields["request"] = request.model_dump(exclude_unset=True)

    def count(self, generation: Generation) -> None:
        """Takes note of the tokens, at the end."""
        choices = generation.choices
        first = min((c.first_token for c in choices if c.first_token is not None), default=None)
        self.fields |= {
            "prompt_tokens": sum(len(choice.output.prompt_token_ids) for choice in choices),
            "completion_tokens": sum(len(choice.output.token_ids) for choice in choices),
            "finish_reasons": Counter(
                str(choice.output.finish_reason)
                for choice in choices
                if choice.output.finish_reason is not None
            ),
        }
        if first is not None:
            self.fields["first_token_s"] = round(first - self.arrival, 6)

    def write(self, method: str, path: str, status: int) -> None:
        """Writes the line."""
        logger.info(
            "request",
            extra={
                "request_id": self.request_id,
                "method": method,
                "path": path,
                "status": status,
                "seconds": round(time.monotonic() - self.arrival, 6),
                **self.fields,
            },
        )


def log_as_json(level: int) -> None:
    """Has this package and uvicorn log lines of JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            ["asctime", "levelname", "message"],
            rename_fields={"asctime": "time", "levelname": "level"},
        )
    )
    for name in ("slora_jax.server", "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers, one.propagate = [handler], False
        one.setLevel(level)
