# SPDX-License-Identifier: Apache-2.0
"""Text goes to tokens and back, and a stream of pieces is the text that a whole decode gives."""

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slora_jax.tokenizer import Detokenizer, Tokenizer, TokenizerError, load_tokenizer
from tests.tokenizer.kinds import END, FRAGMENTS, byte_fallback, byte_level, save

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    model_dir = tmp_path_factory.mktemp("byte_level")
    loaded = load_tokenizer(save(byte_level(), model_dir, chat_template=CHAT_TEMPLATE))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def llama2(tmp_path_factory) -> Tokenizer:
    loaded = load_tokenizer(save(byte_fallback(), tmp_path_factory.mktemp("byte_fallback")))
    assert loaded is not None
    return loaded


def stream(tokenizer: Tokenizer, ids, prompt=(), skip_special_tokens=True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens)
    return [*map(detokenizer.append, ids), detokenizer.flush()]


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=f"cannot load the tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("hé")
    assert ids == list("hé".encode())
    end = tokenizer.encode(END)
    assert tokenizer.decode([*ids, *end], skip_special_tokens=True) == "hé"
    assert tokenizer.decode([*ids, *end], skip_special_tokens=False) == f"hé{END}"
    assert tokenizer.special_ids == frozenset(end)


def test_spaces_before_punctuation_are_kept(tmp_path):
    model_dir = save(byte_level(), tmp_path, clean_up_tokenization_spaces=True)
    loaded = load_tokenizer(model_dir)
    assert loaded is not None
    assert loaded.decode(list(b"so , what ?"), skip_special_tokens=True) == "so , what ?"


def test_chat_template(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"user:hi{END}assistant:"
    assert ids == tokenizer.encode(f"user:hi{END}assistant:")


def test_chat_template_refuses(tokenizer):
    with pytest.raises(TokenizerError, match="chat template refuses these messages: no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "hi"}])


def test_no_chat_template(llama2):
    with pytest.raises(TokenizerError, match="has no chat template; send a plain prompt"):
        llama2.apply_chat_template([{"role": "user", "content": "hi"}])


def test_token_text(tokenizer, llama2):
    assert tokenizer.token_text(ord("h")) == "h"
    assert tokenizer.token_text(ord(" ")) == " "
    assert tokenizer.token_text(0xE2) == "\ufffd"
    assert tokenizer.token_text(min(tokenizer.special_ids)) == END
    word = llama2.encode("a")[0]
    assert llama2.decode([word], skip_special_tokens=True) == "a"
    assert llama2.token_text(word) == " a"


def test_a_character_comes_out_with_its_last_byte(tokenizer):
    assert stream(tokenizer, "a€é😀".encode()) == [*"a", "", "", "€", "", "é", "", "", "", "😀", ""]


def test_flush_shows_what_never_became_a_character(tokenizer):
    assert stream(tokenizer, b"a\xf0\x9f") == ["a", "", "", "\ufffd"]


def test_text_before_half_a_character_is_not_held(tokenizer):
    space_and_half_emoji = 256 + FRAGMENTS.index(b" \xf0\x9f")
    rest_of_emoji = 256 + FRAGMENTS.index(b"\x98\x80")
    assert stream(tokenizer, [space_and_half_emoji, rest_of_emoji]) == [" ", "😀", ""]


def test_spaces_after_the_prompt_are_kept(llama2):
    ids = llama2.encode("b a")
    assert stream(llama2, ids[2:], prompt=ids[:2]) == [" a", ""]
    assert stream(llama2, ids[2:]) == ["a", ""]


@given(st.text(max_size=60))
@example("\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd")
@example("👩‍👩‍👧‍👧 नमस्ते 😀😀😀😀😀😀")
def test_streams_any_text_without_delay(tokenizer, text):
    pieces = stream(tokenizer, text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        shown = ""
        for end, piece in enumerate(pieces[:-1], start=1):
            shown += piece
            assert shown == text.encode()[:end].decode(errors="ignore")


TOKENS = st.lists(
    st.one_of(
        st.integers(0, 256 + len(FRAGMENTS) + 1),  # anything
        st.integers(0x80, 0xBF),  # bytes that continue a character
        st.integers(256, 256 + len(FRAGMENTS) + 1),
    ),
    max_size=60,
)


@given(ids=TOKENS, skip=st.booleans())
@example(ids=[0xC3] + [256] * 50 + [0xA9], skip=True)
@example(ids=[0xFF] * 50, skip=True)
def test_streams_any_tokens_as_a_whole_decode(tokenizer, ids, skip):
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == whole


@given(prompt=st.text(alphabet="ab €😀", max_size=30), text=st.text(max_size=30))
@pytest.mark.parametrize("kind", ["tokenizer", "llama2"])
def test_continues_a_prompt(request, kind, prompt, text):
    tokenizer = request.getfixturevalue(kind)
    prompt_ids, ids = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text))
    whole = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids, prompt=prompt_ids)) == whole[len(before) :]


def test_finishes_the_character_that_the_prompt_began(tokenizer):
    assert stream(tokenizer, [0x98, 0x80, ord("!")], prompt=b"so \xf0\x9f") == ["", "😀", "!", ""]


@given(st.text(alphabet="ab €é😀\n", max_size=80))
def test_streams_byte_fallback(llama2, text):
    ids = llama2.encode(text)
    assert "".join(stream(llama2, ids)) == llama2.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "ids", [list("a😀".encode()), [0xFF], [0x80], [256], [256 + len(FRAGMENTS)]], ids=str
)
def test_each_token_costs_a_bounded_decode(tokenizer, ids, monkeypatch):
    decoded = []
    decode = Tokenizer.decode

    def record(self, ids, skip_special_tokens):
        decoded.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", record)
    pieces = stream(tokenizer, ids * 400)
    monkeypatch.undo()
    assert "".join(pieces) == tokenizer.decode(ids * 400, skip_special_tokens=True)
    assert max(decoded, default=0) <= 40
    assert len(decoded) <= 1.5 * len(ids) * 400 + 10


def test_loading_says_nothing_about_torch_and_leaves_logging_alone(tmp_path):
    save(byte_level(), tmp_path)
    program = (
        "import logging, pathlib, sys; import slora_jax.tokenizer as t;"
        "assert 'transformers' not in sys.modules;"
        f"t.load_tokenizer(pathlib.Path({str(tmp_path)!r}));"
        "assert not logging.getLogger('transformers').filters"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
