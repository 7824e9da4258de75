# SPDX-License-Identifier: Apache-2.0
"""From a conversation to a prompt, by the model's own template."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from slora_jax.tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    inner: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """See `Tokenizer.chat_text`."""
    if not inner.chat_template:
        raise TokenizerError(
            "this model's tokenizer has no chat template; send a plain prompt to the "
            "completions API, or serve an instruction-tuned model"
        )
    variables = variables or {}
    taken = variables.keys() & signature(inner.apply_chat_template).parameters.keys()
    if taken:
        raise TokenizerError(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}")
    try:
        return str(
            inner.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        )
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise TokenizerError(f"the chat template refuses these messages: {error}") from error
