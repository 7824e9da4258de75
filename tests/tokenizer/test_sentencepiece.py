# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with SentencePiece's file only: the ids are SentencePiece's own."""

import io
import json

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from slora_jax.tokenizer import Detokenizer, TokenizerError, load_tokenizer

TEXT = "the quick brown fox jumps over a lazy dog and serves many adapters from one page pool"
WORDS = ["the", " ", "  ", "\n", "fox", "é", "😊", "▁", "lazy ", "\t"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS)).map("".join))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request) -> bytes:
    words, model = TEXT.split(), io.BytesIO()
    lines = (" ".join(words[i % 16 :] + words[: i % 7]) for i in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=320,
        model_type=request.param,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def processor(trained) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=trained)


def write(model_dir, trained, **config):
    (model_dir / "tokenizer.model").write_bytes(trained)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | config
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def tokenizer(trained, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("sentencepiece")
    (model_dir / "added_tokens.json").write_text('{"<pad>": 400}')
    return write(model_dir, trained, pad_token="<pad>")


@given(text=TEXTS)
@example(text=" lazy")
@example(text="the  fox\njumps é😊")
def test_ids_are_sentencepieces(processor, tokenizer, text):
    if any(name in text for name in SPECIAL):
        return
    ids = processor.encode(text)
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    if "▁" not in text:
        assert tokenizer.decode([1, *ids], skip_special_tokens=True) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (f" {text}" if text else "")
    detokenizer = Detokenizer(tokenizer, ())
    pieces = [*map(detokenizer.append, ids), detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@given(before=TEXTS, behind=TEXTS, special=st.sampled_from(SPECIAL))
def test_texts_are_cut_at_special_tokens(processor, tokenizer, before, behind, special):
    if any(name in f"{before}{special}{behind}".replace(special, "", 1) for name in SPECIAL):
        return
    token = 400 if special == "<pad>" else processor.piece_to_id(special)
    want = [*processor.encode(before), token, *processor.encode(behind)]
    assert tokenizer.encode(f"{before}{special}{behind}", add_special_tokens=False) == want
    assert token in tokenizer.special_ids


def test_no_space_behind_a_special_token_where_the_config_says_so(trained, processor, tmp_path):
    tokenizer = write(tmp_path, trained, legacy=False, add_bos_token=False, add_eos_token=True)
    ids = tokenizer.encode("the fox</s>the fox")
    end, space = processor.eos_id(), processor.encode("the fox")
    assert ids[: len(space) + 1] == [*space, end]
    assert ids[-1] == end
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the fox</s>the fox</s>"
    assert processor.encode("the") != ids[len(space) + 1 :][: len(processor.encode("the"))]


def test_tokens_that_take_their_spaces_along(trained, tmp_path):
    entry = {"content": "<role>", "special": True, "rstrip": True}
    tokenizer = write(tmp_path, trained, added_tokens_decoder={"401": entry})
    fox = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("<role>  \nfox", add_special_tokens=False) == [401, *fox]


def test_what_the_file_knows_and_does_not(trained, tokenizer):
    assert tokenizer.eos_id == 2
    assert tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.token_bytes(10_000) == b""
    assert tokenizer.decode([10_000], skip_special_tokens=True) == ""
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3 has it
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is no model of SentencePiece: .*"):
        load_tokenizer(tmp_path)
