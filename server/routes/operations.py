# SPDX-License-Identifier: Apache-2.0
"""Probes, metrics, and what the page at / shows; text to tokens and back."""

from collections.abc import Callable

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from server.engine_client import State
from server.errors import Invalid, NotFound, Unavailable, as_http_error
from server.metrics import max_lora
from server.prompts import Limit
from server.routes.common import API_KEY, BODY_ERRORS, Front, JsonRoute, documented
from server.writing import write
from slora_jax import __version__
from slora_jax.core import RequestError
from slora_jax.openai.errors import UnknownModelError
from slora_jax.openai.selection import find_adapter, names_of
from slora_jax.openai.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

router = APIRouter(route_class=JsonRoute, tags=["operations"])

_SILENT = "the engine has said nothing for too long"
_FEW_TOKENS = 256  # some milliseconds
_MOST_TOKENS = 65_536  # of a text to tokenize or tokens to show, or as many as a prompt may have


@router.get("/health", response_class=Response, responses=documented(503))
@router.get("/health/ready", response_class=Response, responses=documented(503))
@router.get("/ping", response_class=Response, responses=documented(503))
async def ready(front: Front) -> Response:
    """200 while requests are served; 503 while the engine loads, when it is dead or hangs, and
    while the server is shutting down. For readiness and startup probes."""
    if front.draining:
        raise Unavailable("the server is shutting down")
    front.client.check_ready()
    if not front.client.is_responsive:
        raise Unavailable(_SILENT)
    return Response()


@router.get("/health/live", response_class=Response, responses=documented(503))
async def live(front: Front) -> Response:
    """503 if only a new start of the server would help: the engine hangs, or is dead and not
    started again. 200 also while it loads and while the server is shutting down."""
    client = front.client
    if client.state is State.DEAD and not front.draining and not front.config.restart:
        client.check_ready()
    if client.state is State.READY and not client.is_responsive:
        raise Unavailable(_SILENT)
    return Response()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(front: Front) -> Response:
    """For Prometheus, with vLLM's names."""
    return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Version(BaseModel):
    """Of slora-jax."""

    version: str


@router.get("/version")
async def version() -> Version:
    """Of slora-jax."""
    return Version(version=__version__)


class ResidentAdapter(BaseModel):
    """An adapter in the pool; `users` are requests of the batch."""

    names: list[str]
    pages: int
    rank: int
    users: int
    pinned: bool


class Pool(BaseModel):
    """Pages by use. `cached` are those of adapters that nobody uses and that are not pinned."""

    pages: int
    page_bytes: int
    page_size: int
    kv: int
    adapters: int
    cached: int
    free: int


class Status(BaseModel):
    """What the page at / shows.

    Attributes:
        state: of the engine.
        running, waiting: choices in the batch, and in the queue.
        tokens_per_second: over the last seconds.
        first_token_s: a mean of the last requests' times to the first token; null: none yet.
        max_lora: adapters that the pool can hold.
        hits, misses, evictions: of the adapters in the pool.
    """

    state: State
    failure: str | None
    draining: bool
    model: str
    device: str | None
    running: int
    waiting: int
    tokens_per_second: float
    first_token_s: float | None
    pool: Pool | None
    residents: list[ResidentAdapter]
    max_lora: int | None
    hits: int
    misses: int
    evictions: int


@router.get("/status", dependencies=[API_KEY], responses=documented(401))
async def status(front: Front) -> Status:
    """The engine, its batch and its pool now."""
    client, stats, ready = front.client, front.client.stats, front.client.ready
    pool, most = None, None
    if stats is not None and ready is not None:
        in_use = sum(one.pages for one in stats.residents if one.users or one.pinned)
        pool = Pool(
            pages=stats.pages,
            page_bytes=ready.page_bytes,
            page_size=ready.page_size,
            kv=stats.kv_pages,
            adapters=in_use,
            cached=sum(one.pages for one in stats.residents) - in_use,
            free=stats.free_pages,
        )
        most = max_lora(stats, ready.max_loras, front.config.max_loras)
    return Status(
        state=client.state,
        failure=client.failure,
        draining=front.draining,
        model=front.config.base_name,
        device=None if ready is None else ready.device,
        running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0,
        tokens_per_second=front.metrics.tokens_per_second if stats else 0.0,
        first_token_s=front.metrics.mean_first_token_s,
        pool=pool,
        residents=[
            ResidentAdapter(
                names=list(one.names),
                pages=one.pages,
                rank=one.rank,
                users=one.users,
                pinned=one.pinned,
            )
            for one in (stats.residents if stats else ())
        ],
        max_lora=most,
        hits=stats.hits if stats else 0,
        misses=stats.misses if stats else 0,
        evictions=stats.evictions if stats else 0,
    )


_TOKEN_ERRORS = {**BODY_ERRORS, **documented(404, 503)}


async def _check_model(front: Front, model: str | None) -> None:
    """Raises NotFound unless `model` is absent, the base model or an adapter: all share tokens."""
    if model is not None:
        bases = front.config.served_model_names
        try:
            find_adapter(model, bases, await front.catalog.known(names_of(model, bases)))
        except UnknownModelError as error:
            raise NotFound(str(error), "model") from error


def _most_tokens(max_model_len: int) -> int:
    return max(_MOST_TOKENS, max_model_len)


@router.post(
    "/tokenize",
    dependencies=[API_KEY],
    response_model=TokenizeResponse,
    responses=_TOKEN_ERRORS,
)
async def tokenize(body: TokenizeRequest, front: Front) -> Response:
    """Token ids of a prompt, or of a conversation."""
    await _check_model(front, body.model)
    max_model_len = front.client.check_ready().max_model_len
    most = _most_tokens(max_model_len)
    limit = Limit(most, RequestError(f"the text has over {most} tokens: send it in parts"))
    try:
        if body.messages is not None:
            special = bool(body.add_special_tokens)
            tokens = await front.prompts.chat(body.messages, body, special, limit)
        else:
            assert body.prompt is not None
            special = body.add_special_tokens is not False
            tokens = await front.prompts.text(body.prompt, special, limit)
    except RequestError as error:
        raise as_http_error(error) from error

    def response() -> TokenizeResponse:
        found = TokenizeResponse(
            count=len(tokens), max_model_len=max_model_len, tokens=tokens, token_strs=None
        )
        if body.return_token_strs:
            found.token_strs = [front.texts.text(token) or "" for token in tokens]
        return found

    return await _answer(front, response, len(tokens))


@router.post(
    "/detokenize",
    dependencies=[API_KEY],
    response_model=DetokenizeResponse,
    responses=_TOKEN_ERRORS,
)
async def detokenize(body: DetokenizeRequest, front: Front) -> Response:
    """The text of tokens."""
    await _check_model(front, body.model)
    front.prompts.need_tokenizer()
    ready, tokens = front.client.check_ready(), body.tokens
    most, vocab = _most_tokens(ready.max_model_len), ready.vocab_size
    if len(tokens) > most:
        raise Invalid(f"tokens holds {len(tokens)}, and {most} is the most", "tokens")
    bad = next((token for token in tokens if not 0 <= token < vocab), None)
    if bad is not None:
        raise Invalid(f"tokens holds {bad}; token ids are from 0 to {vocab - 1}", "tokens")

    def response() -> DetokenizeResponse:
        return DetokenizeResponse(prompt=front.texts.decode(tokens, skip_special_tokens=False))

    return await _answer(front, response, len(tokens))


async def _answer(front: Front, response: Callable[[], BaseModel], tokens: int) -> Response:
    threads = front.threads if tokens > _FEW_TOKENS else None
    content = await write(lambda: [response()], threads)
    return Response(content, media_type="application/json")
