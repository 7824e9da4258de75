# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of each kind that Llamas come with, small enough to be written down."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

BEGIN, END, PLAIN = "<|begin|>", "<|end|>", "<plain>"
# Tokens of more than one byte that begin or end inside a character: é is c3 a9, 😀 is f0 9f 98 80.
FRAGMENTS = [b"\xa9\xc3", b" \xf0\x9f", b"\x98\x80", b"\x80 \xf0", b"\xff\xfe", b"he", b"\xe2\x82"]


def save(raw: RawTokenizer, model_dir: Path, **config) -> Path:
    model_dir.mkdir(exist_ok=True)
    raw.save(str(model_dir / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | config
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    return model_dir


def byte_level() -> RawTokenizer:
    """Like Llama 3's: token b < 256 is byte b, then come FRAGMENTS and two added tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    pieces = [bytes([byte]) for byte in range(256)] + FRAGMENTS
    vocab = {"".join(letters[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(END, special=True), AddedToken(PLAIN, special=False)])
    return raw


def byte_fallback() -> RawTokenizer:
    """Like Llama 2's: letters and the space are tokens, all else is spelled in bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefg", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    raw = RawTokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[arg-type]
    )
    strip = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), *strip]  # type: ignore[list-item]
    )
    raw.add_special_tokens([END])
    return raw


def byte_fallback_without_prefix() -> RawTokenizer:
    raw = byte_fallback()
    raw.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[arg-type]
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return raw


def unigram() -> RawTokenizer:
    """Like T5's, with bytes for what has no piece."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁", -2.0), *((letter, -3.0) for letter in "abcdefg"), ("▁a", -2.5), ("bc", -4.0)]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()]  # type: ignore[list-item]
    )
    raw.add_special_tokens([END])
    return raw


def several_special_tokens() -> RawTokenizer:
    """Like Llama 3's chat models: a text begins with a token, and some take their spaces along."""
    raw = byte_level()
    raw.add_special_tokens([BEGIN, AddedToken("<|role|>", rstrip=True, special=True)])
    begin = raw.token_to_id(BEGIN)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return raw


KINDS = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, no prefix": byte_fallback_without_prefix,
    "unigram": unigram,
    "several special tokens": several_special_tokens,
}
