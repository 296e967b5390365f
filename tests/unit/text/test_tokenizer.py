"""Tokens and chat prompts are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moeless.core.errors import ConfigError, RequestError
from moeless.text.tokenizer import Tokenizer
from tests.unit.gateway.support import CHATML, write_tokenizer

USER = {"role": "user", "content": "What is <b>2 + 2</b>?\n"}
ASSISTANT = {"role": "assistant", "content": "  4 & that's 'it'  "}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: list[list[dict[str, str]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "é😀\t{{ x }} {% raw %}"}],
    [{"role": "user", "content": ""}],
]

TEMPLATES = {
    "chatml": CHATML,
    "special tokens and trimming": """
        {{- bos_token }}
        {% for message in messages %}
            {% if message['role'] == 'user' %}
        [INST] {{ message['content'] | trim }} [/INST]
            {%- elif message.role == 'assistant' %}
         {{ message['content'] }}{{ eos_token }}
            {% else %}
        <<SYS>>{{ message.content }}<</SYS>>
            {% endif %}
        {% endfor %}
    """,
    "namespaces, loop controls and slices": (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ loop.index }}:{{ m['content'] }}{% if ns.n > 2 %}{% break %}{% endif %}"
        "{% endfor %}{{ ns.n }}"
    ),
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ tools is none }}",
    "generation blocks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "macros and tests": (
        "{% macro head(role) %}<{{ role | upper }}>{% endmacro %}{% for m in messages %}{{ head(m.role) }}"
        "{% if m.content is string and m.tool_calls is not defined %}{{ m.content }}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y-%m') }}{{ documents is none }}{{ pad_token is defined }}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("in_own_file", [False, True])
def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path, template: str, in_own_file: bool) -> None:
    write_tokenizer(tmp_path, chat_template=None if in_own_file else template)
    if in_own_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS:
        rendered = ours.render_chat(messages)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.encode_chat(rendered) == ids


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"add_bos_token": None},
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_prompts_get_the_special_tokens_that_transformers_adds(
    tmp_path: Path, config: dict[str, Any], adds_bos: bool
) -> None:
    write_tokenizer(tmp_path, adds_bos=adds_bos)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode_prompt("a <s> b") == theirs("a <s> b")["input_ids"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = write_tokenizer(tmp_path_factory.mktemp("both"))
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_becomes_the_tokens_of_transformers(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    rendered = ours.render_chat([{"role": "user", "content": text}])
    assert rendered == theirs.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def test_named_templates_use_the_default_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    assert Tokenizer.load(tmp_path).render_chat([USER]) == "D"
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False) == "D"


def test_special_tokens_of_older_checkpoints_are_found(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ bos_token }}|{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}|{{ eos_token }}"})
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False,
                                  "single_word": False}, "eos_token": "</s>"})
    )  # fmt: skip
    assert Tokenizer.load(tmp_path).render_chat([USER]) == "<s>|</s>"
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False) == "<s>|</s>"


def test_a_truncating_tokenizer_does_not_cut_a_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    assert len(Tokenizer.load(tmp_path).encode_prompt("ten letters")) == 12


def test_messages_that_a_template_refuses_are_the_clients_fault(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with the user!') }}{% endif %}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(RequestError, match="Begin with the user!") as raised:
        tokenizer.render_chat([SYSTEM])
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append({}) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(RequestError):
        tokenizer.render_chat([USER])


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="/v1/completions"):
        tokenizer.render_chat([USER])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_damaged_configuration_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
