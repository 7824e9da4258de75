# SPDX-License-Identifier: Apache-2.0
"""Which of a checkpoint's files say how text becomes tokens.

transformers takes seconds to import: only where there is a tokenizer.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slora_jax.tokenizer.errors import TokenizerError
from slora_jax.tokenizer.tokenizer import Tokenizer
from slora_jax.tokenizer.vocabulary import TokenizerJson, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JSON, _MODEL, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint from its own files, never from the network.

    The ids are those of `tokenizer.json`, or where there is none of `tokenizer.model`, whatever
    `tokenizer_config.json` calls the class. transformers reads the chat template and the names of
    the special tokens; of other files (`vocab.json` and `merges.txt`) it makes the tokenizer.

    Returns:
        The tokenizer, or None where the directory has no tokenizer files.

    Raises:
        TokenizerError: the files are damaged, or need a package that is not installed.
    """
    if not any((model_dir / name).is_file() for name in (_JSON, _MODEL, _CONFIG)):
        return None
    try:
        config = _read_json(model_dir / _CONFIG)
        if (model_dir / _JSON).is_file():
            vocabulary: Vocabulary = TokenizerJson.from_file(model_dir / _JSON)
        elif (model_dir / _MODEL).is_file():
            vocabulary = _sentencepiece(model_dir, config)
        else:
            return _of_other_files(model_dir)
        inner = _templates(model_dir)
        return Tokenizer(vocabulary, inner, _special_ids(vocabulary, inner, config))
    except Exception as error:  # transformers and tokenizers raise nearly every class there is
        raise TokenizerError(f"cannot load the tokenizer in {model_dir}: {error}") from error


def _templates(model_dir: Path) -> "PreTrainedTokenizerBase":
    """What transformers reads beside the vocabulary; its own is left empty."""
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers.models import BPE

    with _no_advice_on_torch():
        from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast.from_pretrained(
        model_dir, local_files_only=True, tokenizer_object=RawTokenizer(BPE())
    )


def _of_other_files(model_dir: Path) -> Tokenizer:
    with _no_advice_on_torch():
        from transformers import AutoTokenizer
    inner = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    vocabulary = TokenizerJson(inner.backend_tokenizer)
    return Tokenizer(vocabulary, inner, _special_ids(vocabulary, inner, {}))


def _sentencepiece(model_dir: Path, config: Mapping[str, Any]) -> Vocabulary:
    from slora_jax.tokenizer.sentencepiece_model import AddedToken, SentencePieceModel

    added = {
        name: AddedToken(int(i)) for name, i in _read_json(model_dir / "added_tokens.json").items()
    }
    for i, entry in config.get("added_tokens_decoder", {}).items():
        flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
        added[entry["content"]] = AddedToken(int(i), **flags)
    return SentencePieceModel(
        model_dir / _MODEL,
        added,
        add_bos=config.get("add_bos_token", True) is not False,
        add_eos=config.get("add_eos_token") is True,
        legacy=config.get("legacy", True) is not False,
    )


def _special_ids(
    vocabulary: Vocabulary, inner: "PreTrainedTokenizerBase", config: Mapping[str, Any]
) -> frozenset[int]:
    """Those of the vocabulary, and those that the tokenizer's config names."""
    named = [vocabulary.token_id(str(name)) for name in inner.all_special_tokens]
    for i, entry in config.get("added_tokens_decoder", {}).items():
        if entry.get("special") and vocabulary.token_id(entry.get("content", "")) == int(i):
            named.append(int(i))
    return vocabulary.special_ids | {token for token in named if token is not None}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
