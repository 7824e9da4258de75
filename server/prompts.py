# SPDX-License-Identifier: Apache-2.0
"""From what a request says to token ids. Long texts do not hold up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from server.errors import Invalid
from slora_jax.core import RequestError, check_prompt_length, prompt_too_long
from slora_jax.openai.chat import ChatCompletionRequest, ChatTemplateFields
from slora_jax.openai.completions import CompletionRequest
from slora_jax.openai.messages import Message
from slora_jax.tokenizer import Tokenizer, TokenizerError

_LONG_TEXT = 20_000  # characters, some milliseconds of tokenization
_MESSAGE = 40  # characters; a template took about 8 microseconds for each empty message


class Limit(NamedTuple):
    """How long a text may be.

    Attributes:
        tokens: texts that are certainly longer are not tokenized as a whole.
        error: what is raised then.
    """

    tokens: int
    error: RequestError


class PromptEncoder:
    """Turns texts and conversations into token ids.

    A text that is too long is refused before all of it is tokenized.

    Args:
        tokenizer: None for a model without one.
        threads: for long texts.
    """

    def __init__(self, tokenizer: Tokenizer | None, threads: Executor) -> None:
        self._tokenizer = tokenizer
        self._threads = threads

    async def prompts_of(
        self, request: CompletionRequest | ChatCompletionRequest, max_model_len: int
    ) -> list[list[int]]:
        """Token ids of each of a request's prompts; those that it gives as such stay as they are.

        Args:
            request: what was asked.
            max_model_len: most tokens of a prompt and its output.

        Raises:
            Invalid: there is no tokenizer, or it refuses a prompt.
            RequestError: a prompt is too long.
        """
        limit = Limit(max_model_len, prompt_too_long(f"over {max_model_len}", max_model_len))
        if isinstance(request, ChatCompletionRequest):
            prompt = await self.chat(request.messages, request, request.add_special_tokens, limit)
            check_prompt_length(len(prompt), max_model_len)
            return [prompt]

        def tokens_of(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                prompt = self._encode(prompt, request.add_special_tokens, limit)
            check_prompt_length(len(prompt), max_model_len)
            return prompt

        length = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
        return await self._run(lambda: [*map(tokens_of, request.prompts)], length, "prompt")

    async def text(self, text: str, add_special_tokens: bool, limit: "Limit") -> list[int]:
        """Token ids of a text."""
        return await self._run(
            lambda: self._encode(text, add_special_tokens, limit), len(text), "prompt"
        )

    async def chat(
        self,
        messages: Sequence[Message],
        fields: ChatTemplateFields,
        add_special_tokens: bool,
        limit: "Limit",
    ) -> list[int]:
        """Token ids of a conversation."""

        def encode() -> list[int]:
            text = self.need_tokenizer().chat_text(
                [message.for_template() for message in messages],
                add_generation_prompt=fields.add_generation_prompt,
                continue_final_message=fields.continue_final_message,
                variables=fields.chat_template_kwargs,
            )
            return self._encode(text, add_special_tokens, limit)

        length = sum(_MESSAGE + len(message.text) for message in messages)
        if fields.chat_template_kwargs or any(message.has_more for message in messages):
            length = max(length, _LONG_TEXT)  # what a template does with them is up to it
        return await self._run(encode, length, "messages")

    def need_tokenizer(self) -> Tokenizer:
        """Raises Invalid if the model has none."""
        if self._tokenizer is None:
            raise Invalid("the model has no tokenizer: send a prompt of token ids", "prompt")
        return self._tokenizer

    def _encode(self, text: str, add_special_tokens: bool, limit: "Limit") -> list[int]:
        tokenizer = self.need_tokenizer()
        if tokenizer.is_longer(text, limit.tokens):
            raise limit.error
        return tokenizer.encode(text, add_special_tokens)

    async def _run[T](self, encode: Callable[[], T], length: int, param: str) -> T:
        """What `encode` gives for so many characters."""
        try:
            if length < _LONG_TEXT:
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        except RequestError:
            raise
        except TokenizerError as error:
            raise Invalid(str(error), param) from error
        except (TypeError, ValueError) as error:  # a lone surrogate, say
            raise Invalid(f"this is no text: {error}", param) from error
