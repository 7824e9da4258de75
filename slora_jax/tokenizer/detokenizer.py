# SPDX-License-Identifier: Apache-2.0
"""Text as tokens come, without ever showing half a character."""

from collections.abc import Sequence

from slora_jax.tokenizer.tokenizer import Tokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no whole character
_CHARACTER_TOKENS = 4  # the most tokens that share one character, as it has at most four bytes
_CONTEXT_TOKENS = (
    2 * _CHARACTER_TOKENS
)  # enough to find the start of a character, and then hold one
_WINDOW_TOKENS = 2 * _CONTEXT_TOKENS


class Detokenizer:
    """Turns tokens into text as they come, without ever showing half a character.

    The pieces that `append` and `flush` return add up to the decoded text. Only a window of the
    last tokens is decoded each time: its first `_shown` characters are out already, and `_clean` of
    its tokens had been taken when the text last ended in a whole character.

    What is not UTF-8 comes out as a whole decode shows it, with one exception: such a decode turns
    a run of byte-fallback tokens with an error anywhere into U+FFFD only; whole characters of the
    run that are out already stay out.

    Args:
        tokenizer: of the model.
        prompt_ids: what the tokens continue, and whose text is not repeated. An unfinished
            character at its end comes out with the first piece.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._shown = 0
        self._clean = 0
        for token in self._context(prompt_ids):
            self.append(token)

    def append(self, token_id: int) -> str:
        """Takes one more token and returns the text that it completes, often none."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = len(text.rstrip(_HALF))
        garbage = len(self._window) - self._clean >= _CHARACTER_TOKENS
        if whole < len(text) and garbage:
            whole = len(text) - 1  # what has not become a character by now never will, but the last
        piece = text[self._shown : whole]
        self._shown = max(self._shown, whole)
        if not text.endswith(_HALF):
            start, self._clean = self._clean, len(self._window)
            if len(self._window) > _WINDOW_TOKENS:
                self._drop(start, text)
        elif len(self._window) - self._clean > _WINDOW_TOKENS:
            # No token ends a character here. UTF-8 finds its way back within three bytes.
            self._drop(len(self._window) - _CONTEXT_TOKENS, text)
        return piece

    def flush(self) -> str:
        """Returns what was held back, at the end of the sequence."""
        text = self._decode(self._window)
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _drop(self, count: int, text: str) -> None:
        """Forgets the window's first tokens; as many characters at its end stay held back."""
        held = len(text) - self._shown
        del self._window[:count]
        self._shown = len(self._decode(self._window)) - held
        self._clean = max(0, self._clean - count)

    def _context(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The prompt's last tokens, if possible from the start of a character on."""
        recent = [token for token in prompt_ids[-_WINDOW_TOKENS:] if token not in self._skipped]
        starts = range(-_CONTEXT_TOKENS, -_CONTEXT_TOKENS - _CHARACTER_TOKENS, -1)
        contexts = (recent[start:] for start in starts)
        return next(
            (context for context in contexts if not self._decode(context).startswith(_HALF)),
            recent[-_CONTEXT_TOKENS:],
        )
