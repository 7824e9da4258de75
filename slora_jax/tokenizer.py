# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: a thin layer over transformers, and streaming detokenization.

transformers takes seconds to import, so that only `load_tokenizer` does, and only where there is a
tokenizer. The engine itself works on token ids and needs none of this.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no whole character
_CHARACTER_TOKENS = 4  # the most tokens that share one character, as it has at most four bytes
_CONTEXT_TOKENS = (
    2 * _CHARACTER_TOKENS
)  # enough to find the start of a character, and then hold one
_WINDOW_TOKENS = 2 * _CONTEXT_TOKENS
_PIECE = 16_384  # characters that are tokenized at a time to see how long a text is
_CUT_TOKENS = 16  # tokens that a cut may add


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or cannot do what is asked of it."""


def load_tokenizer(model_dir: Path) -> "Tokenizer | None":
    """Loads the tokenizer of a checkpoint from its own files, never from the network.

    Returns:
        The tokenizer, or None where the directory has no tokenizer files.

    Raises:
        TokenizerError: the files are damaged, or need a package that is not installed.
    """
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with _no_advice_on_torch():
        from transformers import AutoTokenizer
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(model_dir, local_files_only=True))
    except Exception as error:  # transformers and tokenizers raise nearly every class there is
        raise TokenizerError(f"cannot load the tokenizer in {model_dir}: {error}") from error


@contextmanager
def _no_advice_on_torch() -> Iterator[None]:
    """Drops the one line of advice that importing transformers without torch logs."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class Tokenizer:
    """What the engine and the server need of a transformers tokenizer.

    Attributes:
        special_ids: tokens that `skip_special_tokens` leaves out.
    """

    def __init__(self, inner: "PreTrainedTokenizerBase") -> None:
        self._inner = inner
        added = inner.added_tokens_decoder
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts what the model expects around it."""
        # verbose: the engine checks the length itself, and says so in its own words.
        return self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False)

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

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """What the chat template makes of a conversation.

        Args:
            messages: the conversation.
            add_generation_prompt: end where the assistant's reply begins.
            continue_final_message: end inside the last message.
            variables: further ones for the template.

        Raises:
            TokenizerError: the tokenizer has no chat template, or the template refuses this.
        """
        if not self._inner.chat_template:
            raise TokenizerError(
                "this model's tokenizer has no chat template; send a plain prompt to the "
                "completions API, or serve an instruction-tuned model"
            )
        variables = variables or {}
        taken = variables.keys() & signature(self._inner.apply_chat_template).parameters.keys()
        if taken:
            raise TokenizerError(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}")
        try:
            return str(
                self._inner.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **variables,
                )
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error

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
        return self._inner.decode(  # type: ignore[return-value]
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # meant for WordPiece; eats spaces elsewhere
        )

    def token_text(self, token: int) -> str:
        """The text of one token inside a text, special tokens included, for logprobs.

        Decoders in the manner of SentencePiece drop a space that begins a text, so the token is
        decoded behind itself.
        """
        alone = self.decode([token], skip_special_tokens=False)
        return self.decode([token, token], skip_special_tokens=False)[len(alone) :]


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
