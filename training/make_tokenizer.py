# SPDX-License-Identifier: Apache-2.0
"""The demo's byte-level tokenizer: the id of a byte token is the byte's value.

A byte-level BPE without merges, so any UTF-8 text survives encoding and decoding.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from training.batches import SPECIAL_TOKENS
from training.checkpoints import write_json

# A chat is its last message, so it tokenises to the same ids as that text sent as a plain prompt.
CHAT_TEMPLATE = "<|begin|>{{ messages[-1]['content'] }}<|sep|>"


def byte_vocabulary() -> dict[str, int]:
    """The ByteLevel pre-tokenizer's printable stand-in for every byte.

    Printable Latin-1 bytes stand for themselves; the rest are numbered from U+0100 upwards.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    vocabulary = {}
    others = 0
    for byte in range(256):
        if byte in printable:
            vocabulary[chr(byte)] = byte
        else:
            vocabulary[chr(0x100 + others)] = byte
            others += 1
    return vocabulary


def build_tokenizer() -> Tokenizer:
    """The tokenizer, wrapping each text as `<|begin|> text <|sep|>`."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    # use_regex would only split the text into pieces for merges, and there are none.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|sep|>",
        special_tokens=[(token, SPECIAL_TOKENS[token]) for token in ("<|begin|>", "<|sep|>")],
    )
    return tokenizer


def save_tokenizer(directory: Path, max_length: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token, token_id in SPECIAL_TOKENS.items()
            },
            "additional_special_tokens": ["<|sep|>"],
            "bos_token": "<|begin|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|end|>",
            "model_max_length": max_length,
            "pad_token": "<|pad|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
