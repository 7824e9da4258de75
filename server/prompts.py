# SPDX-License-Identifier: Apache-2.0
"""From what a request says to token ids. Long texts do not hold up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from server.errors import Invalid
from slora_jax.openai.chat import ChatCompletionRequest, ChatTemplateFields, Message
from slora_jax.openai.completions import CompletionRequest
from slora_jax.tokenizer import Tokenizer, TokenizerError

_LONG_TEXT = 20_000  # characters, some milliseconds of tokenization


class PromptEncoder:
    """Turns texts and conversations into token ids.

    Args:
        tokenizer: None for a model without one.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    async def prompts_of(
        self, request: CompletionRequest | ChatCompletionRequest
    ) -> list[list[int]]:
        """Token ids of each of a request's prompts; those that it gives as such stay as they are.

        Raises:
            Invalid: there is no tokenizer, or it refuses a prompt.
        """
        if isinstance(request, ChatCompletionRequest):
            return [await self.chat(request.messages, request, request.add_special_tokens)]
        return [
            await self.text(prompt, request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompts
        ]

    async def text(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        encode = partial(self.need_tokenizer().encode, text, add_special_tokens)
        return await self._run(encode, len(text), "prompt")

    async def chat(
        self, messages: Sequence[Message], fields: ChatTemplateFields, add_special_tokens: bool
    ) -> list[int]:
        """Token ids of a conversation."""
        encode = partial(
            self.need_tokenizer().apply_chat_template,
            [message.for_template() for message in messages],
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            add_special_tokens=add_special_tokens,
            variables=fields.chat_template_kwargs,
        )
        return await self._run(encode, sum(len(message.text) for message in messages), "messages")

    def need_tokenizer(self) -> Tokenizer:
        """Raises Invalid if the model has none."""
        if self._tokenizer is None:
            raise Invalid("the model has no tokenizer: send a prompt of token ids", "prompt")
        return self._tokenizer

    async def _run(self, encode: Callable[[], list[int]], length: int, param: str) -> list[int]:
        try:
            return encode() if length < _LONG_TEXT else await asyncio.to_thread(encode)
        except TokenizerError as error:
            raise Invalid(str(error), param) from error
        except (TypeError, ValueError) as error:  # a lone surrogate, say
            raise Invalid(f"this is no text: {error}", param) from error
