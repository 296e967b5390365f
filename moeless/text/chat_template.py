"""Render a chat with a model's own jinja template, as transformers' apply_chat_template does, without transformers.

Called by tokenizer.py. The template comes with the checkpoint and so from a stranger: it runs in jinja's immutable
sandbox, and in the gateway within the limits of a process of its own (gateway/text_process.py). A test compares the
output with that of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moeless.core.errors import ConfigError, RequestError

_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_ERROR_CHARS = 500
"""Characters of a template's own words that an error quotes."""


class RenderLimitError(Exception):
    """Raised into a template that has run for too long."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant tokens for training; when serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """A compiled template with the special tokens that it may name.

    Raises: ConfigError if the source is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            self.names: frozenset[str] = frozenset(jinja2.meta.find_undeclared_variables(tree))
            self.attributes: frozenset[str] = _attributes_of(tree)
            self._template = environment.from_string(source)
        except (MemoryError, RenderLimitError):
            raise
        except Exception as error:  # constants are computed here, by whatever the template applies to them
            raise ConfigError(f"the chat template is not valid: {_first_words(error)}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, ending where the assistant's answer begins.

        Args:
            add_generation_prompt: end with the head of an assistant's message.
            continue_final_message: end within the last message instead, so that the answer goes on with it.
            variables: further variables of the template (`chat_template_kwargs`).
        Raises: RequestError if the template refuses the messages (an order of roles it does not know, for example).
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        names["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        names["messages"] = _with_end_mark(messages) if continue_final_message else messages
        try:
            rendered = self._template.render(names)
        except (MemoryError, RenderLimitError):
            raise
        except Exception as error:
            # Whatever a stranger's template raises, it raises about these messages.
            raise RequestError(
                f"The model's chat template refuses these messages: {_first_words(error)}",
                param="messages",
                code="invalid_value",
            ) from error
        return _until_end_mark(rendered) if continue_final_message else rendered


def _attributes_of(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Collect the fields of a message that the template may read: every attribute and every string in it."""
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | strings)


def _with_end_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with a mark behind the last one's text, as transformers finds the end of what is to be continued."""
    *others, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*others, {**last, "content": content + _END_MARK}]
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        *parts, part = content
        return [*others, {**last, "content": [*parts, {**part, "text": part["text"] + _END_MARK}]}]
    raise RequestError(
        "'continue_final_message' needs a last message with text.", param="continue_final_message", code="invalid_value"
    )


def _until_end_mark(rendered: str) -> str:
    end = rendered.rfind(_END_MARK.strip())
    if end < 0:
        raise RequestError(
            "The model's chat template leaves the last message out, so that it cannot be continued.",
            param="continue_final_message",
            code="invalid_value",
        )
    # A template that trims messages has trimmed the space within the mark.
    is_trimmed = not rendered.startswith(_END_MARK, end)
    return rendered[:end].rstrip() if is_trimmed else rendered[:end]


def _first_words(error: Exception) -> str:
    words = str(error) or type(error).__name__
    return words if len(words) <= _MAX_ERROR_CHARS else f"{words[:_MAX_ERROR_CHARS]}…"
