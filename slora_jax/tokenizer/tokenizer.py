# SPDX-License-Identifier: Apache-2.0
"""What the engine and the server need of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slora_jax.tokenizer.chat_template import ChatTemplate
from slora_jax.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 16_384  # characters that are tokenized at a time to see how long a text is
_CUT_TOKENS = 16  # tokens that a cut may add


class Tokenizer:
    """Text to token ids and back, and conversations to text.

    Args:
        vocabulary: makes the ids.
        inner: has the chat template and the names of the special tokens.
        special_ids: tokens that `skip_special_tokens` leaves out.

    Attributes:
        special_ids: as given.
        eos_id: the end of a sequence, as the tokenizer's config has it; None if it names none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        inner: "PreTrainedTokenizerBase",
        special_ids: frozenset[int],
    ) -> None:
        self._vocabulary = vocabulary
        self._inner = inner
        self._template = ChatTemplate(inner)
        self.special_ids = special_ids
        eos = inner.eos_token
        self.eos_id = None if eos is None else vocabulary.token_id(str(eos))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts what the model expects around it.

        Raises:
            TypeError or ValueError: it is no text; a lone surrogate, say.
        """
        return self._vocabulary.encode(text, add_special_tokens)

    def is_longer(self, text: str, most: int) -> bool:
        """Whether a text certainly has more than `most` tokens.

        It takes no longer than `most` tokens do, however long the text: pieces are tokenized until
        it is certain. Each cut between two of them may add a few tokens, which do not count.
        """
        if len(text) <= max(most, _PIECE):
            return False
        found = 0
        for start in range(0, len(text), _PIECE):
            piece = self.encode(text[start : start + _PIECE], add_special_tokens=False)
            found += len(piece) - _CUT_TOKENS
            if found > most:
                return True
        return False

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """What the chat template makes of a conversation.

        Args:
            messages: the conversation.
            **options: `add_generation_prompt` (default true): end where the assistant's reply
                begins; `continue_final_message`: end inside the last message; `variables`: further
                ones for the template.

        Raises:
            TokenizerError: the tokenizer has no chat template, or the template refuses this.
        """
        return self._template.render(messages, **options)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: the conversation.
            add_special_tokens: in addition to those that the template writes.
            **options: as of `chat_text`.

        Raises:
            TokenizerError: as `chat_text`.
        """
        return self.encode(self.chat_text(messages, **options), add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        if skip_special_tokens:
            ids = [token for token in ids if token not in self.special_ids]
        return self._vocabulary.decode(ids)

    def token_text(self, token: int) -> str:
        """The text of one token inside a text, special tokens included, for logprobs.

        Decoders in the manner of SentencePiece drop a space that begins a text, so the token is
        decoded behind itself.
        """
        alone = self._vocabulary.decode([token])
        return self._vocabulary.decode([token, token])[len(alone) :]

    def token_bytes(self, token: int) -> bytes:
        """The token's own bytes inside a text: part of a character, perhaps."""
        found = self._vocabulary.own_bytes(token)
        return self.token_text(token).encode() if found is None else found
