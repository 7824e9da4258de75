# SPDX-License-Identifier: Apache-2.0
"""From a conversation to a prompt, by the model's own template."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from slora_jax.tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

type Form = Literal["text", "parts"]

_MOST_ARGUMENTS = 100_000  # characters of JSON
_MARK = "slora-jax-looks-for-this"
_USERS = [{"role": "user", "content": said} for said in ("-", [{"type": "text", "text": "-"}])]


class ChatTemplate:
    """Renders conversations as clients send them.

    Clients send a content as one text or as a list of parts; a template reads one of the two, or
    both. What it doesn't read it is not given: it would leave the text out, without a word. What
    it reads is seen from what it makes of an example.

    Args:
        inner: has the template.
    """

    def __init__(self, inner: "PreTrainedTokenizerBase") -> None:
        self._inner = inner
        self._reads: dict[str, frozenset[Form]] = {}
        self._takes_objects: bool | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """See `Tokenizer.chat_text`."""
        self._check()
        variables = variables or {}
        taken = variables.keys() & signature(self._inner.apply_chat_template).parameters.keys()
        if taken:
            raise TokenizerError(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}")
        adapted = [self._adapt(message) for message in messages]
        try:
            return self._apply(
                adapted,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error

    def _check(self) -> None:
        templates = self._inner.chat_template
        if not templates:
            raise TokenizerError(
                "this model's tokenizer has no chat template; send a plain prompt to the "
                "completions API, or serve an instruction-tuned model"
            )
        if isinstance(templates, dict) and "default" not in templates:
            raise TokenizerError(
                f"this model's tokenizer has the chat templates {', '.join(sorted(templates))}: "
                "name one of them default in its tokenizer_config.json"
            )

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._inner.apply_chat_template(messages, tokenize=False, **options))

    def _adapt(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in a form that the template reads."""
        adapted, content = dict(message), message.get("content")
        if (calls := message.get("tool_calls")) and self._reads_objects():
            adapted["tool_calls"] = [*map(_read, calls)]
        if isinstance(content, list) and self._form("parts", message) == "text":
            adapted["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._form("text", message) == "parts":
            adapted["content"] = [{"type": "text", "text": content}]
        return adapted

    def _form(self, sent: Form, message: Mapping[str, Any]) -> Form:
        """`sent` if the template reads it from such a message, or neither; else the other one."""
        role = str(message.get("role"))
        if role not in self._reads:
            self._reads[role] = self._try(role)
        reads = self._reads[role]
        other: Form = "text" if sent == "parts" else "parts"
        return other if other in reads and sent not in reads else sent

    def _reads_objects(self) -> bool:
        """Whether it does not show a tool call's arguments as OpenAI's clients send them: as text.

        Most templates take an object and write it down, as Transformers says, and would quote a
        text once more.
        """
        if self._takes_objects is None:
            sent = json.dumps({_MARK: 1})
            call = {"type": "function", "id": "abcdefghi"}
            call |= {"function": {"name": "f", "arguments": sent}}
            assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
            shown = self._attempts([[user, assistant] for user in _USERS])
            self._takes_objects = not any(sent in text for text in shown)
        return self._takes_objects

    def _try(self, role: str) -> frozenset[Form]:
        """The forms whose text a template shows, in a message of this role."""
        parts = [{"type": "text", "text": _MARK}]
        contents: dict[Form, Any] = {"text": _MARK, "parts": parts}
        return frozenset(form for form, said in contents.items() if self._shows(role, said))

    def _shows(self, role: str, content: Any) -> bool:
        """Whether the template shows a text, and not how Python or JSON write a list."""
        message = {"role": role, "content": content}
        beside = [[message, user] for user in _USERS] + [[user, message] for user in _USERS]
        for shown in self._attempts([[message], *beside]):
            if _MARK in shown:
                return not any(quoted in shown for quoted in ("'text'", '"text"'))
        return False

    def _attempts(self, conversations: Iterable[list[dict[str, Any]]]) -> Iterator[str]:
        """What the template makes of those that it takes."""
        for conversation in conversations:
            # It may want the roles in another order, or a content in another form.
            with suppress(Exception):
                yield self._apply(conversation, add_generation_prompt=False)


def _read(call: Any) -> Any:
    """A tool call with its arguments read, if they are an object in JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    sent = function["arguments"]
    if len(sent) > _MOST_ARGUMENTS:
        raise TokenizerError(
            f"the arguments of a tool call have {len(sent)} characters; at most {_MOST_ARGUMENTS}"
        )
    try:
        arguments = json.loads(sent or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
