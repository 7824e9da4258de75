# SPDX-License-Identifier: Apache-2.0
"""Conversations become prompts as Transformers makes them, and no text is lost on the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.tokenizer import TokenizerError, load_tokenizer
from tests.tokenizer.kinds import byte_level, save

TEXT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
)
# Llama Guard's: an answer is a text behind a question that must be in parts.
MIXED = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]"
    "{% if m.role == 'user' %}{% for p in m.content %}{{ p['text'] }}{% endfor %}"
    "{% else %}{{ m.content + '.' }}{% endif %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "SHOW{% endfor %}{% elif m.role == 'tool' %}"
    "{{ m.tool_call_id }}={{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture
def load(tmp_path):
    return lambda template: load_tokenizer(save(byte_level(), tmp_path, chat_template=template))


def in_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def render(tokenizer, *messages, **options):
    return tokenizer.chat_text(messages, add_generation_prompt=False, **options)


@pytest.mark.parametrize(
    ("template", "one", "two"),
    [
        (TEXT, "[user]hi", "[user]a\nb"),
        (TRIMMED, "[user]hi", "[user]a\nb"),
        (PARTS, "[user]hi", "[user]ab"),
        (EITHER, "[user]<hi>", "[user]<a><b>"),
        (MIXED, "[user]hi", "[user]ab"),
    ],
    ids=["text", "trimmed", "parts", "either", "mixed"],
)
def test_a_content_is_read_in_both_forms(load, template, one, two):
    tokenizer = load(template)
    text = "[user]hi"
    assert render(tokenizer, {"role": "user", "content": "hi"}) == text
    assert render(tokenizer, {"role": "user", "content": in_parts("hi")}) == one
    assert render(tokenizer, {"role": "user", "content": in_parts("a", "b")}) == two


def test_each_role_has_its_form(load):
    tokenizer = load(MIXED)
    for question in ("q", in_parts("q")):
        for answer in ("a", in_parts("a")):
            sent = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            assert render(tokenizer, *sent) == "[user]q[assistant]a."


def test_messages_are_not_changed(load):
    message = {"role": "user", "content": in_parts("a", "b")}
    render(load(TEXT), message)
    assert message == {"role": "user", "content": in_parts("a", "b")}


@pytest.mark.parametrize(
    ("show", "shown"),
    [
        ("{{ c.function.arguments | tojson }}", '{"b": [1], "a": "é"}'),  # Llama 3.1, Qwen
        ("{{ c.function.arguments }}", '{"b":[1],"a":"é"}'),  # as it was sent
        ("{{ '(' + c.function.arguments + ')' }}", '({"b":[1],"a":"é"})'),  # DeepSeek
        ("{{ '(' ~ c.function.arguments ~ ')' }}", '({"b":[1],"a":"é"})'),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
            "b=[1];a=é;",
        ),
        ("{{ c.id }}{{ c.function.name }}", "c1f"),
        ("{{ c.function.arguments is string }}", "False"),
        ("{% for k, v in c.function.arguments.items() %}{{ k }},{% endfor %}", "b,a,"),
    ],
)
def test_arguments_are_read_and_written(load, show, shown):
    function = {"name": "f", "arguments": '{"b":[1],"a":"é"}'}
    call = {"id": "c1", "type": "function", "function": function}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    tokenizer = load(CALLS.replace("SHOW", show))
    assert render(tokenizer, assistant, result) == f"{shown}c1=42"


@pytest.mark.parametrize("arguments", ["[1]", "not json", "[" * 50_000, {"a": 1}, None])
def test_arguments_that_are_no_object_stay_as_they_are(load, arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    tokenizer = load(CALLS.replace("SHOW", "{{ c.function.arguments }}"))
    shown = render(tokenizer, {"role": "assistant", "tool_calls": [call]})
    assert shown == str(arguments)
    tokenizer = load(CALLS.replace("SHOW", "{{ c.function.arguments | tojson }}"))
    calls = [{**call, "function": {"arguments": "1" * 200_000}}]
    with pytest.raises(TokenizerError, match="have 200000 characters; at most 100000"):
        render(tokenizer, {"role": "assistant", "tool_calls": calls})


def test_templates_without_a_default(load):
    tokenizer = load([{"name": "rag", "template": TEXT}, {"name": "tool_use", "template": TEXT}])
    with pytest.raises(TokenizerError, match="the chat templates rag, tool_use: name one of them"):
        render(tokenizer, {"role": "user", "content": "hi"})


def test_what_a_template_refuses_is_said_in_its_words(load):
    with pytest.raises(TokenizerError, match="refuses these messages: roles must alternate"):
        render(load(MIXED), {"role": "assistant", "content": "hi"})


CONTENT = st.text(alphabet="ab é\n", min_size=1, max_size=6)
HISTORY = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.lists(CONTENT)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module", params=[TEXT, PARTS, EITHER], ids=["text", "parts", "either"])
def tokenizer(request, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(save(byte_level(), model_dir, chat_template=request.param))


@given(history=HISTORY, plain=st.booleans())
def test_no_text_is_lost(tokenizer, history, plain):
    """Whatever the form, all of it is there in its order, and nothing of how lists are written."""
    messages = [
        {"role": role, "content": "".join(texts) if plain else in_parts(*texts)}
        for role, texts in history
    ]
    shown = render(tokenizer, *messages)
    want = "".join(f"[{role}]{''.join(texts)}" for role, texts in history)
    between = str.maketrans("", "", "<>\n")
    assert shown.translate(between) == want.translate(between)
