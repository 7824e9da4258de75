# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that has only SentencePiece's own file, `tokenizer.model`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import re2
from tokenizers import decoders

from slora_jax.tokenizer.errors import TokenizerError
from slora_jax.tokenizer.vocabulary import BYTE_PIECE

_SPACE = "▁"
# A message of protobuf may follow another one of its kind and overrules it. This one says
# `normalizer_spec { add_dummy_prefix: false }`.
_NO_SPACE_BEFORE = bytes([3 << 3 | 2, 2, 3 << 3, 0])


@dataclass(frozen=True)
class AddedToken:
    """A token that text is cut at before SentencePiece sees it.

    Attributes:
        special: it is no text.
        lstrip: it takes the spaces before it.
        rstrip: and those behind it.
    """

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceModel:
    """`tokenizer.model` and the tokens that other files add.

    SentencePiece itself makes the ids: a conversion loses a space here and a merge there.

    Args:
        path: of the file.
        added: by what they are in a text. The model's control pieces are such tokens anyway.
        add_bos: put the model's first token before a text.
        add_eos: put its last one behind it.
        legacy: text behind such a token gets the space that SentencePiece puts before a text.

    Raises:
        TokenizerError: the file is none of SentencePiece's.
    """

    def __init__(
        self,
        path: Path,
        added: Mapping[str, AddedToken],
        *,
        add_bos: bool = True,
        add_eos: bool = False,
        legacy: bool = True,
    ) -> None:
        self._model = _read(path)
        self._inside = self._model if legacy else _read(path, _NO_SPACE_BEFORE)
        pieces = range(self._model.get_piece_size())
        control = {self._model.id_to_piece(i): AddedToken(i) for i in pieces if self._is_control(i)}
        self._added = {**control, **added}
        self._pieces = {entry.id: name for name, entry in self._added.items()}
        self.special_ids = frozenset(entry.id for entry in self._added.values() if entry.special)
        self._cuts = re2.compile("|".join(map(self._pattern, sorted(self._added, key=_longest))))
        self._before = [self._model.bos_id()] if add_bos and self._model.bos_id() >= 0 else []
        self._behind = [self._model.eos_id()] if add_eos and self._model.eos_id() >= 0 else []
        self._decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary.encode`."""
        text.encode()  # a lone surrogate is an error of the text's, as for `TokenizerJson`
        ids, end = [], 0
        for found in self._cuts.finditer(text) if self._added else ():
            ids += self._encode_piece(text[end : found.start()], end == 0)
            ids.append(self._added[found[found.lastindex]].id)
            end = found.end()
        ids += self._encode_piece(text[end:], end == 0)
        return [*self._before, *ids, *self._behind] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary.decode`."""
        pieces = map(self._piece, ids)
        return self._decoder.decode([piece for piece in pieces if piece is not None])

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary.token_id`."""
        if token in self._added:
            return self._added[token].id
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def own_bytes(self, token: int) -> bytes | None:
        """See `Vocabulary.own_bytes`."""
        piece = self._piece(token)
        if piece is None or token in self._pieces:
            return (piece or "").encode()
        found = BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(found[1]) if found else piece.replace(_SPACE, " ").encode()

    def _encode_piece(self, text: str, is_first: bool) -> list[int]:
        return (self._model if is_first else self._inside).encode(text) if text else []

    def _piece(self, token: int) -> str | None:
        if token in self._pieces:
            return self._pieces[token]
        return self._model.id_to_piece(token) if token < self._model.get_piece_size() else None

    def _is_control(self, token: int) -> bool:
        return self._model.is_control(token) or self._model.is_unknown(token)

    def _pattern(self, name: str) -> str:
        entry = self._added[name]
        before, behind = (r"\s*" if strips else "" for strips in (entry.lstrip, entry.rstrip))
        return f"{before}({re2.escape(name)}){behind}"


def _longest(name: str) -> tuple[int, str]:
    """The order in which tokens are looked for: one may begin with another."""
    return -len(name), name


def _read(path: Path, overrule: bytes = b"") -> Any:
    from sentencepiece import SentencePieceProcessor  # few checkpoints need it

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes() + overrule)
    except (OSError, RuntimeError) as error:
        raise TokenizerError(
            f"{path} is no model of SentencePiece: {error}; save a tokenizer.json beside it, with "
            "save_pretrained of transformers"
        ) from error
