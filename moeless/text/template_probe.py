"""Finds out in which form a chat template reads messages and how it ends a turn, by rendering chats of known words.

Called once for a model. Templates differ: some read `content` as a string, some only as a list of parts (MiniMax-Text),
some either; some read a tool call's arguments as JSON text, some as an object. In the wrong form the user's words are
left out silently, or appear with Python's brackets and quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from moeless.core.errors import RequestError
from moeless.text.chat_template import ChatTemplate

ContentForm = Literal["string", "parts", "one part"]
"""`one part`: a list of a single part; some templates read the first part only."""

_FIRST, _SECOND = "Zwei7quark", "Drei9lepton"
_ROLES = ("user", "system", "assistant", "tool")
_ARGUMENTS = json.dumps({"zkey": _FIRST})


class TemplateTraits(msgspec.Struct, frozen=True, kw_only=True):
    """In which forms a template reads messages. Forms are by role; the default is the string."""

    text_forms: dict[str, ContentForm] = {}
    """For content that came as a string."""
    parts_forms: dict[str, ContentForm] = {}
    """For content that came as a list of parts."""
    arguments_as_object: bool = False
    """Whether a tool call's arguments must be an object instead of JSON text."""
    shows_user: bool = True
    """False: the template leaves out what the user says, in whatever form."""
    end_of_turn_ids: tuple[int, ...] = ()
    """The special token that the template writes behind an assistant's turn."""

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages in the forms that the template reads.

        Raises: RequestError if it leaves out what the user says.
        """
        if not self.shows_user:
            raise RequestError(
                "The model's chat template leaves out what the user says; use /v1/completions.",
                param="messages",
                code="unusable_chat_template",
            )
        return [self._adapt(message) for message in messages]

    def _adapt(self, message: Mapping[str, Any]) -> dict[str, Any]:
        adapted = dict(message)
        content, role = message.get("content"), str(message.get("role"))
        if isinstance(content, str):
            adapted["content"] = _in_form(content, [content], self.text_forms.get(role, "string"))
        elif isinstance(content, list):
            texts = [part["text"] for part in content]
            adapted["content"] = _in_form("".join(texts), texts, self.parts_forms.get(role, "string"))
        if self.arguments_as_object and message.get("tool_calls"):
            adapted["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        return adapted


def probe_template(template: ChatTemplate, special_tokens: Mapping[str, int]) -> TemplateTraits:
    """Render chats of each role in each form.

    Args:
        special_tokens: text → id of the tokenizer's special tokens.
    """
    text_forms: dict[str, ContentForm] = {}
    parts_forms: dict[str, ContentForm] = {}
    shows_user = True
    readable: tuple[ContentForm, ...] = ("string", "one part")
    for role in _ROLES:
        default = text_forms.get("user", "string")
        outcomes = {form: _shows(template, role, form, default) for form in readable}
        as_text = next((form for form in readable if outcomes[form]), None)
        if role == "user":
            # A template that refuses the chat says nothing of others.
            shows_user = as_text is not None or None in outcomes.values()
        text_forms[role] = as_text or default
        parts_forms[role] = "parts" if _shows(template, role, "parts", default) else text_forms[role]
    return TemplateTraits(
        text_forms=text_forms,
        parts_forms=parts_forms,
        arguments_as_object=_reads_object(template, text_forms),
        shows_user=shows_user,
        end_of_turn_ids=_end_of_turn(template, text_forms, special_tokens),
    )


def _in_form(text: str, texts: Sequence[str], form: ContentForm) -> str | list[dict[str, str]]:
    if form == "string":
        return text
    return [{"type": "text", "text": part} for part in (texts if form == "parts" else [text])]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _shows(template: ChatTemplate, role: str, form: ContentForm, others: ContentForm) -> bool | None:
    """Return whether the words of a message of `role` appear unchanged; None if the template refuses the chat."""
    content = _in_form(_FIRST + _SECOND, [_FIRST, _SECOND], form)
    user = {"role": "user", "content": _in_form("Hello", ["Hello"], others)}
    message = {"role": role, "content": content}
    chats: dict[str, list[dict[str, Any]]] = {
        "user": [message],
        "system": [message, user],
        "assistant": [user, message, user],
        "tool": [user, _tool_call(_ARGUMENTS), {**message, "tool_call_id": "call00001", "name": "look"}],
    }
    rendered = _render(template, chats[role], role != "assistant")
    if rendered is None and role == "tool":
        rendered = _render(template, [user, _tool_call(json.loads(_ARGUMENTS)), chats[role][-1]])
    if rendered is None:
        return None
    first, second = rendered.find(_FIRST), rendered.find(_SECOND)
    has_form = any(mark in rendered for mark in ("'text'", '"text"', '\\"text\\"'))
    return 0 <= first < second and not (form != "string" and has_form)


def _reads_object(template: ChatTemplate, forms: Mapping[str, ContentForm]) -> bool:
    """Return whether a tool call's arguments appear only, or unescaped only, if they are an object."""
    user = {"role": "user", "content": _in_form("Hello", ["Hello"], forms["user"])}
    result = {
        "role": "tool",
        "tool_call_id": "call00001",
        "name": "look",
        "content": _in_form("Yes", ["Yes"], forms["tool"]),
    }
    as_text = _render(template, [user, _tool_call(_ARGUMENTS), result])
    if as_text is not None and _FIRST in as_text and '\\"zkey' not in as_text:
        return False
    as_object = _render(template, [user, _tool_call(json.loads(_ARGUMENTS)), result])
    return as_object is not None and _FIRST in as_object


def _end_of_turn(
    template: ChatTemplate, forms: Mapping[str, ContentForm], special_tokens: Mapping[str, int]
) -> tuple[int, ...]:
    user = {"role": "user", "content": _in_form("Hello", ["Hello"], forms["user"])}
    answer = {"role": "assistant", "content": _in_form(_FIRST, [_FIRST], forms["assistant"])}
    rendered = _render(template, [user, answer], add_generation_prompt=False)
    if rendered is None or _FIRST not in rendered:
        return ()
    tail = rendered.rpartition(_FIRST)[2].lstrip()
    ends = [token for token in special_tokens if token and tail.startswith(token)]
    return (special_tokens[max(ends, key=len)],) if ends else ()


def _tool_call(arguments: object) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _render(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt)
    except RequestError:
        return None
