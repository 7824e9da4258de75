# SPDX-License-Identifier: Apache-2.0
"""Which adapter a request asks for. Never is the base model served in an adapter's place."""

from collections.abc import Collection, Container
from functools import partial

from slora_jax.core import RequestError
from slora_jax.openai.errors import UnknownModelError
from slora_jax.openai.generation import GenerationRequest


def find_adapter(
    model: str,
    base_names: Collection[str],
    adapters: Container[str],
    lora_path: str | None = None,
) -> str | None:
    """The adapter that a request asks for; None for the base model.

    Args:
        model: an adapter's name, the base model's, or `base:adapter` (SGLang).
        base_names: what the base model is called.
        adapters: what adapters are called.
        lora_path: an adapter's name, beside the base model's in `model` (SGLang).

    Raises:
        UnknownModelError: a name is nobody's.
        RequestError: `model` and `lora_path` name two adapters.
    """
    named = _adapter_of(model, base_names, adapters)
    if lora_path is None or lora_path == named:
        return named
    if named is not None:
        raise RequestError(
            f"model asks for the adapter {named!r}, lora_path for {lora_path!r}: name one", "model"
        )
    if lora_path not in adapters:
        raise UnknownModelError(lora_path, "lora_path")
    return lora_path


def names_in(request: GenerationRequest, base_names: Collection[str]) -> set[str]:
    """All that a request may name as an adapter.

    Raises:
        RequestError: `lora_path` has more or fewer than there are prompts.
    """
    paths = {path for path in _paths_in(request) if path is not None}
    return paths | names_of(request.model, base_names)


def names_of(model: str, base_names: Collection[str]) -> set[str]:
    """All that `model` may name as an adapter: itself, and what follows the base's name."""
    if model in base_names:
        return set()
    return {model, *(model.removeprefix(f"{base}:") for base in base_names)}


def find_adapters(
    request: GenerationRequest,
    base_names: Collection[str],
    adapters: Container[str],
) -> list[str | None]:
    """The adapter of each of a request's prompts; see `find_adapter`."""
    find = partial(find_adapter, request.model, base_names, adapters)
    if not isinstance(request.lora_path, list):
        return [find(request.lora_path)] * request.num_prompts
    return [*map(find, _paths_in(request))]


def _paths_in(request: GenerationRequest) -> list[str | None]:
    """`lora_path` as a list; each name in it costs a look, so their number is checked first."""
    paths, prompts = request.lora_path, request.num_prompts
    if not isinstance(paths, list):
        return [paths]
    if len(paths) != prompts:
        raise RequestError(
            f"lora_path names {len(paths)} adapters for {prompts} prompts: one or null for each",
            "lora_path",
        )
    return paths


def _adapter_of(model: str, base_names: Collection[str], adapters: Container[str]) -> str | None:
    if model in base_names:
        return None
    if model in adapters:
        return model
    for base in base_names:  # either name may have colons of its own
        adapter = model.removeprefix(f"{base}:")
        if adapter != model and adapter in adapters:
            return adapter
    raise UnknownModelError(model)
