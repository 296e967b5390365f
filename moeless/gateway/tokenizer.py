"""Text to token ids in the gateway, from the files that lie beside a model: tokenizer.json, tokenizer_config.json
and the chat template. Called by admission.py; neither transformers nor torch is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moeless.core.errors import ConfigError, RequestError
from moeless.gateway.chat_template import ChatTemplate


class Tokenizer:
    """The tokenizer and chat template of one model. Encoding releases the interpreter lock and is thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._backend = backend
        self._chat_template = chat_template

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises: ConfigError if there is no tokenizer.json or a file cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"the tokenizer folder must hold tokenizer.json, there is none in {folder}")
        backend = tokenizers.Tokenizer.from_file(str(path))
        # A prompt is refused when it is too long, never cut; and a batch is never padded here.
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(folder, config)
        source = _chat_template_source(folder, config)
        return cls(backend, ChatTemplate(source, special_tokens) if source is not None else None)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that tokenizer.json's post-processor adds.

        add_bos_token and add_eos_token in tokenizer_config.json count for nothing beside it, as in transformers.
        """
        return self._backend.encode(text).ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Raises: RequestError if the model has no chat template or the template refuses the messages."""
        if self._chat_template is None:
            raise RequestError(
                "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        return self._chat_template.render(messages)

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat. The template has written the special tokens already, so none are added."""
        return self._backend.encode(rendered, add_special_tokens=False).ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path.name} must be valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens (`bos_token`, …), which templates use as variables."""
    entries = dict(config)
    if "added_tokens_decoder" not in config:
        # Checkpoints from before tokenizer_config.json held everything.
        entries.update(_read_json(folder / "special_tokens_map.json"))
    extra = entries.get("extra_special_tokens")
    if isinstance(extra, dict):
        entries.update(extra)
    tokens = {}
    for name, value in entries.items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and (name.endswith("_token") or (isinstance(extra, dict) and name in extra)):
            tokens[name] = content
    return tokens


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's entry; of several named templates the default one."""
    for path in (folder / "chat_template.jinja", folder / "additional_chat_templates" / "default.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"chat_template in tokenizer_config.json must be a string, got {type(source).__name__}")
    return source
