"""Messages reach a template in the form that it reads."""

from __future__ import annotations

from typing import Any

import pytest

from moeless.core.errors import RequestError
from moeless.text.chat_template import ChatTemplate
from moeless.text.template_probe import TemplateTraits, probe_template
from tests.unit.gateway.support import CHATML

MINIMAX = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<b>system\n' + message['content'][0]['text'] "
    "+ '<e>\n' }}{% elif message['role'] == 'user' %}{{ '<b>user\n' + message['content'][0]['text'] + '<e>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<b>ai\n' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{ '<e>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<b>ai\n' }}{% endif %}"
)
"""MiniMax-Text-01 reads parts only, and of users and systems the first one only."""
ALL_PARTS = (
    "{% for message in messages %}<{{ message.role }}>{% for part in message.content %}{{ part.text }};{% endfor %}"
    "{% endfor %}"
)
EITHER = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)
DEAF = "{% for message in messages %}<{{ message.role }}>{% endfor %}"

TWO_PARTS = [{"type": "text", "text": "good "}, {"type": "text", "text": "morning"}]


def probed(source: str, **special_tokens: int) -> tuple[ChatTemplate, TemplateTraits]:
    template = ChatTemplate(source, {})
    return template, probe_template(template, {f"<{name}>": token_id for name, token_id in special_tokens.items()})


def render(source: str, *messages: dict[str, Any]) -> str:
    template, traits = probed(source)
    return template.render(traits.adapt(messages))


@pytest.mark.parametrize(
    ("source", "content", "rendered"),
    [
        (CHATML, "good morning", "<|im_start|>user\ngood morning<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, TWO_PARTS, "<|im_start|>user\ngood morning<|im_end|>\n<|im_start|>assistant\n"),
        (MINIMAX, "good morning", "<b>user\ngood morning<e>\n<b>ai\n"),
        (MINIMAX, TWO_PARTS, "<b>user\ngood morning<e>\n<b>ai\n"),
        (ALL_PARTS, "good morning", "<user>good morning;"),
        (ALL_PARTS, TWO_PARTS, "<user>good ;morning;"),
        (EITHER, "good morning", "<user>good morning"),
        (EITHER, TWO_PARTS, "<user>[good ][morning]"),
        ("{{ messages | tojson }}", TWO_PARTS, '[{"role": "user", "content": "good morning"}]'),
    ],
)
def test_content_is_given_in_the_form_that_the_template_reads(source: str, content: object, rendered: str) -> None:
    assert render(source, {"role": "user", "content": content}) == rendered


def test_each_role_has_its_own_form() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": TWO_PARTS},
        {"role": "user", "content": TWO_PARTS},
    ]
    assert render(MINIMAX, *chat) == (
        "<b>system\nBe brief.<e>\n<b>user\nHi<e>\n<b>ai\ngood morning<e>\n<b>user\ngood morning<e>\n<b>ai\n"
    )


def test_a_template_that_leaves_out_the_users_words_is_refused() -> None:
    with pytest.raises(RequestError, match="leaves out what the user says") as raised:
        render(DEAF, {"role": "user", "content": "Hi"})
    assert raised.value.code == "unusable_chat_template"


def test_a_template_that_refuses_the_probes_is_not_called_deaf() -> None:
    source = "{% if messages | length < 3 %}{{ raise_exception('three or more') }}{% endif %}{{ messages[2].content }}"
    user = {"role": "user", "content": "Hi"}
    assert render(source, user, user, user) == "Hi"


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo"}'}}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
]


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ("c.function.arguments", '{"city": "Oslo"}'),
        ("'```' + c['function']['arguments']", '```{"city": "Oslo"}'),
        ("c.function.arguments | tojson", '{"city": "Oslo"}'),
        ("c.function | tojson", '{"name": "look", "arguments": {"city": "Oslo"}}'),
        ("c.function.arguments.items() | list", "[('city', 'Oslo')]"),
        ("(c.function.arguments if c.function.arguments is string else 'object')", '{"city": "Oslo"}'),
    ],
)
def test_arguments_of_past_calls_are_given_as_the_template_reads_them(arguments: str, rendered: str) -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.content is none }}:{% for c in m.tool_calls %}{{ "
        + arguments
        + " }}{% endfor %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    )
    assert render(source, *CALLING) == f"<user>Weather?True:{rendered}<tool>Rain."


def test_a_template_that_cannot_take_a_tool_call_says_so_in_its_words() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools, please!') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RequestError, match="No tools, please!"):
        render(source, *CALLING)


@pytest.mark.parametrize(
    ("tail", "ids"),
    [
        ("<end>", (7,)),
        ("\n<end>\n", (7,)),
        ("<endless>", (8,)),
        ("", ()),
        ("<other>", ()),
        (" bye <end>", ()),
    ],
)
def test_the_token_behind_an_assistants_turn_ends_turns(tail: str, ids: tuple[int, ...]) -> None:
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + tail + "{% endfor %}"
    _, traits = probed(source, end=7, endless=8, en=9)
    assert traits.end_of_turn_ids == ids


def test_the_token_that_ends_the_last_turn_counts_not_that_of_earlier_ones() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' and loop.last %}<return>{% else %}<end>"
        "{% endif %}{% endfor %}"
    )
    _, traits = probed(source, end=7, **{"return": 5})
    assert traits.end_of_turn_ids == (5,)
