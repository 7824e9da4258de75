# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions` and `/v1/chat/completions`."""

import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.answering import answer
from server.routes.common import API_KEY, BODY_ERRORS, Front, JsonRoute, documented
from slora_jax.openai.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatReply,
)
from slora_jax.openai.completions import (
    CompletionChunk,
    CompletionReply,
    CompletionRequest,
    CompletionResponse,
)

router = APIRouter(route_class=JsonRoute, tags=["generation"], dependencies=[API_KEY])

_ERRORS = {**BODY_ERRORS, **documented(404, 429, 503)}


def _stream_of(chunk: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of the other answer: a stream of events."""
    return {
        "description": "The answer; with `stream`, server-sent events, each of whose `data` is "
        f"a {chunk.__name__} or an error, and the last `[DONE]`.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'data: {"id": "cmpl-1", "choices": [{"text": "HEL", …}], …}\n\n'
                "data: [DONE]\n\n",
            }
        },
    }


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={200: _stream_of(CompletionChunk), **_ERRORS},
)
async def create_completion(body: CompletionRequest, http: Request, front: Front) -> Response:
    """Continues prompts: texts or token ids, one or several, each with `n` choices."""
    return await answer(front, http, body, CompletionReply(body, uuid.uuid4().hex, front.texts))


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: _stream_of(ChatCompletionChunk), **_ERRORS},
)
async def create_chat_completion(
    body: ChatCompletionRequest, http: Request, front: Front
) -> Response:
    """Answers a conversation, which the model's chat template turns into a prompt."""
    return await answer(front, http, body, ChatReply(body, uuid.uuid4().hex, front.texts))
