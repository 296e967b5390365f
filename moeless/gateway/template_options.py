"""Arguments of a chat template beside the messages, and fields of a chat that it does not read.

Called by admission.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moeless.core.errors import RequestError
from moeless.gateway.schemas import ChatCompletionRequest, Message
from moeless.text.chat_template import ChatTemplate

_FIELDS_FOR_TEMPLATES = ("reasoning_effort", "verbosity")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")

_MAX_UNREAD_VARIABLES = 16
"""Named one by one; clients and proxies refuse a response whose headers take more than some 8 KB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateOptions:
    """Arguments of ChatTemplate.render, and paths of the fields that the template does not read."""

    variables: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    unread_fields: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments of ChatTemplate.render."""
        return {
            "variables": self.variables,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }


def template_options(body: ChatCompletionRequest, template: ChatTemplate | None) -> TemplateOptions:
    """Raises: RequestError for fields that exclude each other and for variables with a field of their own."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise RequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other; both are true.",
            param="continue_final_message",
            code="invalid_value",
        )
    given = dict(body.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in given:
            raise RequestError(
                f"'chat_template_kwargs' must not hold {name!r}.", param="chat_template_kwargs", code="invalid_value"
            )
    names = template.names if template is not None else frozenset()
    variables = {name: value for name, value in given.items() if name in names}
    unread = _unread_variables([name for name in given if name not in names])
    for name in _FIELDS_FOR_TEMPLATES:
        value = getattr(body, name)
        if value is not None and name in names:
            variables.setdefault(name, value)
        elif value is not None:
            unread.append(name)
    unread += _unread_of_messages(body.messages, template.attributes if template is not None else frozenset())
    return TemplateOptions(
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        unread_fields=tuple(unread),
    )


def _unread_variables(names: Sequence[str]) -> list[str]:
    """Their paths, as many as a response header has room for."""
    paths = [f"chat_template_kwargs.{_header_safe(name)}" for name in names[:_MAX_UNREAD_VARIABLES]]
    num_more = len(names) - len(paths)
    return [*paths, f"chat_template_kwargs ({num_more} more)"] if num_more else paths


def _unread_of_messages(messages: Sequence[Message], attributes: frozenset[str]) -> list[str]:
    unread = [
        f"messages.{name}"
        for name in ("name", "reasoning_content", "tool_call_id")
        if name not in attributes and any(getattr(message, name) is not None for message in messages)
    ]
    parts = (part for message in messages if isinstance(message.content, list) for part in message.content)
    if any(part.cache_control is not None for part in parts):
        unread.append("messages.content.cache_control")
    return unread


def _header_safe(name: str) -> str:
    """A name from a client as a response header may hold it."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "_-.") else "?" for char in name[:64])
