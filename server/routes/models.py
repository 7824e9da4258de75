# SPDX-License-Identifier: Apache-2.0
"""`/v1/models`, and adapters that come and go at run time."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.routes.common import API_KEY, BODY_ERRORS, Front, JsonRoute, documented
from slora_jax.openai.models import (
    LoadLoraAdapterRequest,
    ModelCard,
    ModelList,
    UnloadLoraAdapterRequest,
)

router = APIRouter(route_class=JsonRoute, tags=["models"], dependencies=[API_KEY])

_CHANGE_ERRORS = {**BODY_ERRORS, **documented(403, 404, 503)}
_DONE = {200: {"description": "Done.", "content": {"text/plain": {"example": "Success: …"}}}}


@router.get("/v1/models", responses=documented(401, 503))
async def list_models(front: Front) -> ModelList:
    """The base model and all adapters, those of `--lora-dir` that no request has named included."""
    return ModelList(data=await front.catalog.cards())


@router.get("/v1/models/{model_id:path}", responses=documented(401, 404, 503))
async def show_model(model_id: str, front: Front) -> ModelCard:
    """The base model or an adapter."""
    return await front.catalog.card(model_id)


@router.post(
    "/v1/load_lora_adapter",
    response_class=Response,
    responses={**_DONE, **_CHANGE_ERRORS},
)
@router.post("/load_lora_adapter", response_class=Response, include_in_schema=False)
async def load_lora_adapter(body: LoadLoraAdapterRequest, front: Front) -> Response:
    """Loads a PEFT directory from where the server allows it, while requests run.

    `/load_lora_adapter` does the same.
    """
    await front.catalog.load(
        body.lora_name, body.lora_path, replace=body.load_inplace, pinned=body.pinned
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    response_class=Response,
    responses={**_DONE, **_CHANGE_ERRORS},
)
@router.post("/unload_lora_adapter", response_class=Response, include_in_schema=False)
async def unload_lora_adapter(body: UnloadLoraAdapterRequest, front: Front) -> Response:
    """Refuses new requests for an adapter; those in progress end as usual.

    One that came from `--lora-dir` comes back when a request names it. `/unload_lora_adapter` does
    the same.
    """
    await front.catalog.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
