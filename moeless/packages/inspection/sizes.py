"""Hold the sizes in a config against the tensors that are there.

A config that promises a billion layers or experts would cost gigabytes before its model is found not to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeless.core.errors import CheckpointError
from moeless.packages.inspection.config import EXPERT_COUNTS, numbers_of, sections
from moeless.packages.inspection.headers import TensorHeader

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_MAX_LAYERS_OF_OTHER_PARTS = 1024
"""Parts beside the language model (vision, audio) may have no tensors in the checkpoint."""


def check_sizes(path: Path, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raises: CheckpointError if the config has more layers, experts or width than its tensors could hold."""
    if not headers:
        raise CheckpointError(f"{path.parent}: the safetensors files must hold tensors, they hold none")
    largest_size = max((size for header in headers.values() for size in header.shape), default=0)
    num_tensors = len(headers)
    for section, fields in sections(config):  # which of them a family reads is its own affair
        _check(path, f"{section}num_hidden_layers", fields.get("num_hidden_layers"), num_tensors, "number of tensors")
        for field in EXPERT_COUNTS:
            # Experts are tensors of their own, or slices of one that all of a layer share.
            limit = max(num_tensors, largest_size)
            _check(path, f"{section}{field}", fields.get(field), limit, "what its tensors have room for")
        _check(path, f"{section}hidden_size", fields.get("hidden_size"), largest_size, "largest size of its tensors")
    limit = max(len(headers), _MAX_LAYERS_OF_OTHER_PARTS)
    for name, part in config.items():
        for field in _LAYER_COUNTS:
            if isinstance(part, Mapping):
                _check(path, f"{name}.{field}", part.get(field), limit, "what its tensors have room for")


def _check(path: Path, field: str, value: Any, limit: int, what: str) -> None:
    for number in numbers_of(value):
        if number > limit:
            raise CheckpointError(f"{path}: {field} must be at most {limit} ({what}), got {number}")
