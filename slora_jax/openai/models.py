# SPDX-License-Identifier: Apache-2.0
"""`/v1/models`, and the loading and unloading of adapters, with vLLM's names."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Gateways read lists of names, and people logs.
_NAME = r"^[^,\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
_LONGEST_NAME = 256

AdapterName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=_LONGEST_NAME,
        pattern=_NAME,
        description="what requests call the adapter: without commas and control characters",
    ),
]


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so."""
    return len(name) <= _LONGEST_NAME and re.fullmatch(_NAME, name) is not None


class ModelCard(BaseModel):
    """The base model or an adapter.

    Attributes:
        id: what requests call it.
        created: when the server learned of it, in seconds since 1970.
        root: its directory.
        parent: of an adapter, the base model's name.
        max_model_len: most tokens of a request.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["slora-jax"] = "slora-jax"
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """The base model first, then the adapters: those loaded, and those of `--lora-dir`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadLoraAdapterRequest(BaseModel):
    """The body of a `/v1/load_lora_adapter` request.

    Attributes:
        lora_name: what requests call it.
        lora_path: its PEFT directory, inside one of the allowed ones; if relative, relative to it.
        load_inplace: let the name stand for this one from now on if it stands for another.
        pinned: keep it in the pool.
    """

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={"examples": [{"lora_name": "sql", "lora_path": "/adapters/sql"}]},
    )

    lora_name: AdapterName
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    pinned: bool = False


class UnloadLoraAdapterRequest(BaseModel):
    """The body of a `/v1/unload_lora_adapter` request. vLLM's `lora_int_id` is ignored."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"lora_name": "sql"}]})

    lora_name: AdapterName
