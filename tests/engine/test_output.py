# SPDX-License-Identifier: Apache-2.0
"""From tokens to text: stop strings, wherever they appear, and nothing shown too early."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slora_jax import SamplingParams
from slora_jax.core import FinishReason, Request
from slora_jax.engine.output import RequestProgress
from slora_jax.engine.output_text import OutputText
from slora_jax.tokenizer import load_tokenizer
from tests.tokenizer.kinds import END, byte_level, save

EOS = 7  # a byte that no text here has


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save(byte_level(), tmp_path_factory.mktemp("tokenizer")))


def serve(tokenizer, tokens, **options):
    """All outputs of a request to which the model answers with `tokens`."""
    params = SamplingParams(**{"max_tokens": len(tokens), **options})
    request = Request(
        id="1",
        prompt=[104],
        params=params,
        adapter=None,
        adapter_id=None,
        stop_ids=frozenset((*params.stop_token_ids, EOS)),
        seed=0,
        max_output=params.max_tokens,
    )
    progress = RequestProgress(request, (EOS,), OutputText(tokenizer, request.prompt, params))
    outputs = []
    for token in tokens:
        outputs.append(progress.append(token, None))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def last(tokenizer, text, **options):
    return serve(tokenizer, tokenizer.encode(text), **options)[-1]


@pytest.mark.parametrize(
    ("text", "options", "shown"),
    [
        (f"abc{END}de", {"stop": END}, "abc"),
        (f"abc{END}de", {"stop": END, "skip_special_tokens": False}, "abc"),
        (f"abc{END}de", {"stop": END, "include_stop_str_in_output": True}, f"abc{END}"),
        (f"abc{END}de", {"stop": f"c{END}d"}, "ab"),
        (f"a{END}bc{END}de", {"stop": "cd"}, "abcde"),  # a special token is between them
        (f"a{END}bcde", {"stop": "cd"}, "ab"),
        (f"a{END}{END}bcde", {"stop": f"{END}b"}, "a"),
        (f"abc{END}de", {"stop": [END, "bc"]}, "a"),
        (f"a{END}b{END}", {"stop": END, "min_tokens": 2}, "ab"),
    ],
)
def test_special_tokens_are_stop_strings(tokenizer, text, options, shown):
    output = last(tokenizer, text, **options)
    assert output.text == shown
    found = output.finish_reason is FinishReason.STOP
    assert found == (output.stop_reason is not None) == (shown != "abcde")


def test_a_stop_string_in_the_last_of_the_text(tokenizer):
    """What never became a character comes out only when the output ends."""
    half = [*b"ab", 0xF0, 0x9F]
    output = serve(tokenizer, half, stop="b\ufffd")[-1]
    assert (output.text, output.finish_reason) == ("a", FinishReason.STOP)
    output = serve(tokenizer, [*half, EOS], stop="\ufffd", max_tokens=9)[-1]
    assert (output.text, output.stop_reason) == ("ab", "\ufffd")
    output = serve(tokenizer, half, stop="b\ufffd", min_tokens=4)[-1]
    assert (output.text, output.finish_reason) == ("ab\ufffd", FinishReason.LENGTH)


def test_how_outputs_end(tokenizer):
    ends = [last(tokenizer, "ab\x07c"), last(tokenizer, "abc", stop_token_ids=(ord("b"),))]
    assert [(end.text, end.stop_reason) for end in ends] == [("ab", None), ("a", ord("b"))]
    assert last(tokenizer, "abc", max_tokens=2).finish_reason is FinishReason.LENGTH
    assert last(tokenizer, "abc", stop="b", max_tokens=2).finish_reason is FinishReason.STOP


PIECES = st.lists(st.sampled_from(["a", "b", "ab", "é", "😊", END]), min_size=1, max_size=12)
STOPS = st.lists(st.sampled_from(["ab", "ba", f"a{END}", END, "é", "b😊", f"{END}{END}a"]))


@given(pieces=PIECES, stops=STOPS, skip=st.booleans(), include=st.booleans())
@example(pieces=["a", END, "b"], stops=["ba", "ab"], skip=True, include=False)
def test_any_text_and_any_stop_strings(tokenizer, pieces, stops, skip, include):
    """Against the whole text: it ends at the first character that completes a stop string."""
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
    options = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    outputs = serve(tokenizer, tokens, stop=tuple(stops), **options)
    shown, end = "", None
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False).rstrip("\ufffd")
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            at, end = min(found, key=lambda one: one[0])
            shown = text[:at].replace(END, "") if skip else text[:at]
            shown += end if include else ""
            break
    if end is None:
        shown = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert outputs[-1].text == shown
    assert outputs[-1].stop_reason == end
    assert "".join(output.new_text for output in outputs) == shown
    for output in outputs[:-1]:
        assert shown.startswith(output.text)
