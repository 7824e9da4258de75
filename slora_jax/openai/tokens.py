# SPDX-License-Identifier: Apache-2.0
"""How tokens appear in responses: as text, under distinct names, at offsets in the text."""

from collections.abc import Iterable, Sequence

from slora_jax.tokenizer import Detokenizer, Tokenizer


class TokenTexts:
    """Texts of single tokens, remembered: log-probabilities show the same ones over and over.

    Args:
        tokenizer: None for a model without one.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, list[int]] = {}

    def text(self, token: int) -> str | None:
        """The text of a token; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self.tokenizer.token_text(token)
        return self._texts[token]

    def own_bytes(self, token: int) -> list[int] | None:
        """The token's own bytes, perhaps part of a character; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if token not in self._bytes:
            self._bytes[token] = [*self.tokenizer.token_bytes(token)]
        return self._bytes[token]

    def names(self, tokens: Iterable[int], as_ids: bool = False) -> dict[int, str]:
        """A name for each token that no other of `tokens` has, to be a key of a JSON object.

        It is the token's text. Several tokens may have the same, above all parts of characters,
        which all read U+FFFD; then the first of `tokens` has it, and the others, as all do with
        `as_ids` or without a tokenizer, are `token_id:N`, vLLM's form.
        """
        tokens_by_name: dict[str, int] = {}
        for token in dict.fromkeys(tokens):
            text = None if as_ids else self.text(token)
            if text is None or text in tokens_by_name:
                text = f"token_id:{token}"
            tokens_by_name[text] = token
        return {token: name for name, token in tokens_by_name.items()}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a sequence; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens)


class TokenOffsets:
    """Where the text of each token begins, in characters, as tokens come.

    All tokens that share a character are where it begins.

    Args:
        texts: of the model's tokens.
        context: the tokens that they follow.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(
        self, texts: TokenTexts, context: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._detokenizer = None
        if texts.tokenizer is not None:
            self._detokenizer = Detokenizer(texts.tokenizer, context, skip_special_tokens)
        self._end = 0

    def append(self, tokens: Sequence[int]) -> list[int]:
        """The offsets of the next tokens; all 0 without a tokenizer."""
        offsets = []
        for token in tokens:
            offsets.append(self._end)
            if self._detokenizer is not None:
                self._end += len(self._detokenizer.append(token))
        return offsets
