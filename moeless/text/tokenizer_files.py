"""Reads a model's tokenizer.json, its special tokens and the source of its chat template. Called by tokenizer.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from moeless.core.errors import ConfigError, RequestError

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_QWEN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}

CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
    "GPT2Tokenizer": _GPT,
    "GPTNeoXTokenizer": {**_GPT, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
}
"""Special tokens that transformers' classes add where tokenizer_config.json does not name them."""

MODEL_CLASSES: Mapping[str, str] = {
    "dbrx": "GPT2Tokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "phi": "GPT2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
    "qwen3_omni_moe": "Qwen2Tokenizer",
    "qwen3_vl_moe": "Qwen2Tokenizer",
}
"""model_type → the class that transformers takes where tokenizer_config.json names none."""


@contextmanager
def panics_as_errors(what: str, param: str | None = None) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no Exception, into a RequestError.

    Args:
        what: begins the sentence of the error, for example "The tokenizer cannot encode this text".
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ != "pyo3_runtime":
            raise
        raise RequestError(f"{what}: {str(error)[:300]}", param=param, code="tokenizer_failed") from None


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, without its truncation and padding: a prompt is refused when it is too long, never cut.

    Raises: ConfigError if it is missing or cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"the tokenizer folder must hold tokenizer.json, there is none in {folder}")
    try:
        with panics_as_errors(f"{path} cannot be read"):
            backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens (`bos_token`, …): the files' own, and those that the tokenizer's class adds.

    Raises: ConfigError if a file is damaged.
    """
    config = _read_json(folder / "tokenizer_config.json")
    entries = dict(config)
    if "added_tokens_decoder" not in config:
        # Checkpoints from before tokenizer_config.json held everything.
        entries.update(_read_json(folder / "special_tokens_map.json"))
    extra = entries.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    entries.update(extra)
    tokens = {}
    for name, value in entries.items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and (name.endswith("_token") or name in extra):
            tokens[name] = content
    # A name that the files set to null stays without a token, as in transformers.
    return {name: token for name, token in _class_tokens(folder, config).items() if name not in entries} | tokens


def read_template(folder: Path) -> str | None:
    """The chat template's source: chat_template.jinja, else tokenizer_config.json, else chat_template.json.

    Of several named templates the one called default. Raises: ConfigError if a file is damaged.
    """
    for path in (folder / "chat_template.jinja", folder / "additional_chat_templates" / "default.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        source = _default_template(_read_json(folder / name).get("chat_template"), name)
        if source is not None:
            return source
    return None


def _default_template(source: object, file_name: str) -> str | None:
    if isinstance(source, list):
        source = {
            entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)
        }.get("default")  # fmt: skip
    elif isinstance(source, dict):
        source = source.get("default")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"chat_template in {file_name} must be a string, got {type(source).__name__}")
    return source


def _class_tokens(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    name = config.get("tokenizer_class")
    if name is None:
        name = MODEL_CLASSES.get(str(_read_json(folder / "config.json").get("model_type")))
    return CLASS_TOKENS.get(str(name).removesuffix("Fast"), {})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} must be valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content
