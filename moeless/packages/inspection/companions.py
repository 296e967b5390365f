"""Check what a checkpoint holds beside config and weights: tokenizer, generation config, chat template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moeless.core.errors import CheckpointError
from moeless.packages.inspection.files import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, read_json, require_inside

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files copied into the backbone's folder beside config.json: generation settings, tokenizer, chat template."""

_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_NUMBERS = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
}
"""Fields of a generation config and their ranges."""


def check_companions(path: Path, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError for a file that is too large, not what its name says, or outside the folder."""
    for name in COMPANION_FILES:
        file = path / name
        if file.is_file():
            require_inside(path, file)
            size = file.stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file}: must have at most {MAX_TOKENIZER_BYTES} bytes, has {size}")
    objects = {name: read_json(path / name) for name in _OBJECTS if (path / name).is_file()}
    check_token_ids(path / "config.json", config)
    if "generation_config.json" in objects:
        _check_generation(path / "generation_config.json", objects["generation_config.json"])
    _check_chat_templates(path, objects.get("tokenizer_config.json", {}))
    if (path / "tokenizer.json").is_file():
        _check_tokenizer(path / "tokenizer.json")


def check_token_ids(path: Path, fields: Mapping[str, Any]) -> None:
    """Ids of special tokens are whole numbers or lists of them; -1 stands for none."""
    for field in _TOKEN_IDS:
        value = fields.get(field)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and (not isinstance(item, int) or isinstance(item, bool) or item < -1):
                raise CheckpointError(f"{path}: {field} must be a token id of at least 0 or a list, got {item!r:.60}")


def _check_generation(path: Path, fields: Mapping[str, Any]) -> None:
    check_token_ids(path, fields)
    for field, (low, high) in _NUMBERS.items():
        value = fields.get(field)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{path}: {field} must be a number from {low:g} to {high:g}, got {value!r:.60}")
    top_k = fields.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < -1):
        raise CheckpointError(f"{path}: top_k must be a whole number of at least 0, got {top_k!r:.60}")


def _check_chat_templates(path: Path, tokenizer_config: Mapping[str, Any]) -> None:
    template = tokenizer_config.get("chat_template")
    if template is not None and not isinstance(template, str | list):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: chat_template must be text or a list of named texts, "
            f"got {template!r:.60}"
        )
    alone = path / "chat_template.json"
    if alone.is_file():
        content = read_json(alone).get("chat_template")
        if not isinstance(content, str):
            raise CheckpointError(f"{alone}: chat_template must be text, got {content!r:.60}")
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        size = jinja.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{jinja}: must have at most {MAX_CONFIG_BYTES} bytes, has {size}")
        try:
            jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{jinja}: must be UTF-8 text ({error})") from error


def _check_tokenizer(path: Path) -> None:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a tokenizer of the tokenizers library ({lines[0]})") from error
    if tokenizer.get_vocab_size(with_added_tokens=True) == 0:
        raise CheckpointError(f"{path}: model.vocab must hold tokens, got none")
