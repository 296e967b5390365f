"""Refuses loads that no planner can plan for."""

from __future__ import annotations

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError


def check_load(name: str, load_LE: FloatArray, shape: tuple[int, ...]) -> None:
    """Every value is finite and at least 0, for L layers of E experts.

    Args:
        name: of the argument, for the message.
    Raises: ConfigError that names layer, expert and value of the first that is wrong.
    """
    if load_LE.shape != shape or load_LE.ndim != 2:
        raise ConfigError(f"{name} must be finite, >= 0 and of {shape} layers and experts, got {load_LE.shape}")
    if load_LE.size and not 0 <= load_LE.min() <= load_LE.max() < np.inf:  # false for NaN too
        layer, expert = np.argwhere(~((load_LE >= 0) & (load_LE < np.inf)))[0]
        raise ConfigError(
            f"{name} must be finite and >= 0, got {load_LE[layer, expert]:g} for expert {expert} of layer {layer}"
        )
