# SPDX-License-Identifier: Apache-2.0
"""Ids and texts are those of the file, whatever class the tokenizer's config names."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from slora_jax.tokenizer import Detokenizer, load_tokenizer
from tests.tokenizer.kinds import BEGIN, END, KINDS, PLAIN, byte_level, save

CLASSES = ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"]
WORDS = [
    "a",
    " ",
    "  ",
    "\n",
    "bc",
    "hello",
    "é",
    "😊",
    "▁",
    END,
    BEGIN,
    PLAIN,
    "<|role|>",
    "<unk>",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS)).map("".join))


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request, tmp_path_factory):
    """The file as `tokenizers` reads it, and what we make of it."""
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": False}
    model_dir = save(request.param(), tmp_path_factory.mktemp("tokenizer"), **config)
    return RawTokenizer.from_file(str(model_dir / "tokenizer.json")), load_tokenizer(model_dir)


@given(text=TEXTS, add=st.booleans())
@example(text="hello world\nnew é", add=True)
@example(text="<|role|>  user", add=False)
def test_ids_and_texts_are_the_files(pair, text, add):
    raw, tokenizer = pair
    ids = raw.encode(text, add_special_tokens=add).ids
    assert tokenizer.encode(text, add_special_tokens=add) == ids
    for skip in (True, False):
        whole = raw.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == whole
        detokenizer = Detokenizer(tokenizer, (), skip)
        pieces = [*map(detokenizer.append, ids), detokenizer.flush()]
        assert "".join(pieces) == whole


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_changes_nothing(tmp_path, name):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path, tokenizer_class=name))
    text = "hello world\nnew é"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_nothing_is_cut_or_padded(tmp_path):
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    tokenizer = load_tokenizer(save(raw, tmp_path))
    assert tokenizer.encode("hello world") == list(b"hello world")
    assert tokenizer.encode("he") == list(b"he")


def test_tokens_that_only_the_config_calls_special(tmp_path):
    model_dir = save(byte_level(), tmp_path, pad_token=PLAIN)
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.special_ids == {*tokenizer.encode(END), *tokenizer.encode(PLAIN)}
    assert tokenizer.decode(tokenizer.encode(f"a{PLAIN}"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_of_a_sequence_is_the_configs(tmp_path, where):
    model_dir = save(byte_level(), tmp_path, eos_token=None)
    assert load_tokenizer(model_dir).eos_id is None
    fields = json.loads((model_dir / "tokenizer_config.json").read_text())
    del fields["eos_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(fields))
    content = {"content": END, "special": True, "__type": "AddedToken"}
    fields = fields if where == "tokenizer_config.json" else {}
    (model_dir / where).write_text(json.dumps({**fields, "eos_token": content}))
    tokenizer = load_tokenizer(model_dir)
    assert [tokenizer.eos_id] == tokenizer.encode(END)


@given(text=st.text(alphabet="abc éü😊👩\n", max_size=20))
def test_bytes_of_tokens_are_the_texts(pair, text):
    """Also where a token is part of a character, whose own text is U+FFFD."""
    raw, tokenizer = pair
    ids = raw.encode(text, add_special_tokens=False).ids
    found = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert found in (text, f" {text}")  # with the space that SentencePiece puts before a text


def test_bytes_of_special_and_of_no_tokens(pair):
    raw, tokenizer = pair
    assert tokenizer.token_bytes(raw.token_to_id(END)) == END.encode()
    assert tokenizer.token_bytes(raw.get_vocab_size() + 5) == b""
