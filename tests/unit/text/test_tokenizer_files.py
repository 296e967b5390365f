"""Special tokens and templates are found wherever checkpoints keep them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from moeless.core.errors import ConfigError
from moeless.text.tokenizer import Tokenizer
from moeless.text.tokenizer_files import CLASS_TOKENS, MODEL_CLASSES, read_special_tokens, read_template
from tests.unit.gateway.support import write_tokenizer


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_class_tokens_are_those_of_transformers(name: str) -> None:
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters
    defaults = {
        token: parameters[token].default
        for token in (f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"))
        if token in parameters and parameters[token].default is not None
    }
    assert CLASS_TOKENS[name] == {token: str(default) for token, default in defaults.items()}


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_model_types_have_the_class_that_transformers_gives_them(model_type: str) -> None:
    assert TOKENIZER_MAPPING_NAMES[model_type] == MODEL_CLASSES[model_type]


def write_config(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "<s>"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "<s>"),
        ({"tokenizer_class": "GemmaTokenizer"}, "<bos>"),
        ({"tokenizer_class": "GemmaTokenizer", "bos_token": "<own>"}, "<own>"),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None),
        ({}, None),
    ],
)
def test_the_beginning_token_may_come_from_the_class(tmp_path: Path, config: dict[str, object], bos: str) -> None:
    write_config(tmp_path, **config)
    assert read_special_tokens(tmp_path).get("bos_token") == bos


def test_the_class_may_come_from_the_models_type(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert read_special_tokens(tmp_path)["bos_token"] == "<|endoftext|>"


def test_a_template_gets_the_beginning_token_of_its_class(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    template = "{{ bos_token }}{{ messages[0].content }}"
    write_config(tmp_path, tokenizer_class="LlamaTokenizer", chat_template=template)
    assert Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"


@pytest.mark.parametrize("source", ["T", {"default": "T", "rag": "R"}, [{"name": "default", "template": "T"}]])
def test_a_chat_template_json_alone_is_read(tmp_path: Path, source: object) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    assert read_template(tmp_path) == "T"


def test_the_tokenizers_own_template_comes_before_the_processors(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "P"}')
    write_config(tmp_path, chat_template="T")
    assert read_template(tmp_path) == "T"


@pytest.mark.parametrize("source", [3, {"default": 3}])
def test_a_template_that_is_no_text_is_refused_by_file(tmp_path: Path, source: object) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(ConfigError, match=r"chat_template in chat_template\.json must be a string, got int"):
        read_template(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_refused_by_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_template_that_is_no_jinja_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the chat template is not valid"):
        Tokenizer.load(write_tokenizer(tmp_path, chat_template="{% for %}"))
