"""Finds how many tokens a model takes: its config's positions, extended by rope scaling, and the limit a user sets.

Used by the command line before anything starts, and by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from moeless.core.errors import ConfigError
from moeless.packages.packed_model import PackedModel


def context_length(config: Any) -> int | None:
    """Maximum tokens of one sequence, by a transformers config; None where the config sets no limit.

    `max_position_embeddings`, or what rope scaling makes of the original length where that is more: model cards set
    YaRN as a factor beside an unchanged `max_position_embeddings`. LongRoPE and Llama 3 scale within the positions
    that the config already names.
    """
    text_config = config.get_text_config()
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    lengths = [] if positions is None else [positions, *_scaled_lengths(text_config, positions)]
    return max(lengths, default=None)


def limit_context(config: Any, max_model_len: int | None) -> int:
    """Maximum tokens of one sequence: `max_model_len` if that is set, else the model's own.

    Raises: ConfigError if `max_model_len` is below 1 or more than the model takes, or must be set.
    """
    length = context_length(config)
    if max_model_len is not None and max_model_len < 1:
        raise ConfigError(f"--max-model-len must be at least 1, got {max_model_len}")
    if max_model_len is None and length is None:
        raise ConfigError("--max-model-len must be set: the model's config has no max_position_embeddings")
    if max_model_len is not None and length is not None and max_model_len > length:
        raise ConfigError(
            f"--max-model-len must be at most {length}, the context length of the model, got {max_model_len}"
        )
    limit = length if max_model_len is None else max_model_len
    assert limit is not None
    return limit


def check_context(packed: PackedModel, max_model_len: int | None) -> None:
    """Raises ConfigError if the packed model does not take `max_model_len` tokens, ChecksumError if it is damaged."""
    packed.verify_backbone_file("config.json")
    config = AutoConfig.from_pretrained(packed.backbone_path, local_files_only=True, trust_remote_code=False)
    limit_context(config, max_model_len)


def _scaled_lengths(text_config: Any, positions: int) -> Iterator[int]:
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [rope]:
        factor = parameters.get("factor")
        kind = parameters.get("rope_type", parameters.get("type"))
        if not isinstance(factor, int | float):
            continue
        if kind == "yarn":
            yield int((parameters.get("original_max_position_embeddings") or positions) * factor)
        elif kind in ("dynamic", "linear") and not by_layer_type:
            # Of models with a kind for each layer type, the positions are the extended ones (Gemma's are).
            yield int(positions * factor)
