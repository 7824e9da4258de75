# SPDX-License-Identifier: Apache-2.0
"""Which adapter a request asks for. Never is the base model served in an adapter's place."""

from collections.abc import Collection, Container

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
    """All that a request may name as an adapter."""
    paths = request.lora_path if isinstance(request.lora_path, list) else [request.lora_path]
    return {path for path in paths if path is not None} | names_of(request.model, base_names)


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
    paths, prompts = request.lora_path, request.num_prompts
    if not isinstance(paths, list):
        return [find_adapter(request.model, base_names, adapters, paths)] * prompts
    if len(paths) != prompts:
        raise RequestError(
            f"lora_path names {len(paths)} adapters for {prompts} prompts: one or null for each",
            "lora_path",
        )
    return [find_adapter(request.model, base_names, adapters, path) for path in paths]


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
