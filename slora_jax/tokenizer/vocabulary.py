# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back, as one file of a checkpoint says."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as RawTokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that has no other piece


class Vocabulary(Protocol):
    """What `Tokenizer` needs of a file.

    Attributes:
        special_ids: tokens that are no text, as the file has it.
    """

    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of `text`; `add_special_tokens` puts what the model expects around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence, special tokens included; ids without a token have none."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the file."""
        ...

    def own_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that the file spells in bytes; None: it is spelled in letters."""
        ...


class TokenizerJson:
    """A `tokenizer.json`, verbatim.

    What a class of transformers would make of the file differs between its versions: several of
    them build another tokenizer from the same words.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        raw.no_truncation()  # the engine checks lengths itself
        raw.no_padding()
        self._raw = raw
        added = raw.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._added = {token: entry.content for token, entry in added.items()}
        self._spells_bytes = "ByteLevel" in _types(json.loads(_state(raw.decoder)))

    @classmethod
    def from_file(cls, path: Path) -> "TokenizerJson":
        return cls(RawTokenizer.from_file(str(path)))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary.encode`."""
        return self._raw.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary.decode`."""
        return self._raw.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary.token_id`."""
        return self._raw.token_to_id(token)

    def own_bytes(self, token: int) -> bytes | None:
        """See `Vocabulary.own_bytes`."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._raw.id_to_token(token)
        if piece is None:
            return b""
        if self._spells_bytes:
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece if letter in _BYTE_OF_LETTER)
        found = BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(found[1]) if found else None


def _state(decoder: Any) -> bytes:
    return b"null" if decoder is None else decoder.__getstate__()


def _types(state: Any) -> Iterator[str]:
    """The kinds of decoder within one, as JSON spells it."""
    if isinstance(state, Mapping):
        if isinstance(kind := state.get("type"), str):
            yield kind
        for inner in state.get("decoders", ()):
            yield from _types(inner)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes are themselves, the others 256, 257, …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()
