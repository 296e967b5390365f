"""Measures of a prediction: recall, load error, whether the straggler was foreseen, a bound's coverage and width.

Shapes: n tokens, E experts, k experts per token, B batches.
"""

from __future__ import annotations

import math

import numpy as np

from moeless_predictors.arrays import FloatArray, IntArray


def checked_loads(name: str, load_BE: FloatArray) -> FloatArray:
    """The loads as they are. Raises ValueError, naming batch and expert, unless all are finite and >= 0."""
    is_fault_BE = ~(np.isfinite(load_BE) & (load_BE >= 0))
    if is_fault_BE.any():
        at = tuple(int(i) for i in np.unravel_index(int(is_fault_BE.argmax()), is_fault_BE.shape))
        where = ", ".join(f"{axis} {i}" for axis, i in zip(("batch", "expert")[-len(at) :], at, strict=True))
        raise ValueError(f"{name} must hold loads that are finite and >= 0, got {load_BE[at]} at {where}")
    return load_BE


def recall_at_k(predicted_nk: IntArray, routing_nE: FloatArray) -> float:
    """Share of the true experts (routing > 0) that are among the predicted; 1.0 where there is nothing to find."""
    true_nE = routing_nE > 0
    num_true = int(true_nE.sum())
    if num_true == 0:
        return 1.0
    return float(np.take_along_axis(true_nE, predicted_nk.astype(np.intp), axis=1).sum() / num_true)


def relative_l1(predicted_BE: FloatArray, load_BE: FloatArray) -> float:
    """Mean over batches of sum |predicted - load| / sum load. In [0, 2] for loads of equal sums."""
    checked_loads("predicted_BE", predicted_BE)
    sums_B = checked_loads("load_BE", load_BE).sum(axis=1)
    used_B = sums_B > 0
    if not used_B.any():
        return 0.0
    errors_B = np.abs(predicted_BE - load_BE).sum(axis=1)
    return float((errors_B[used_B] / sums_B[used_B]).mean())


def straggler_hit_rate(predicted_BE: FloatArray, load_BE: FloatArray, *, share: float = 0.1) -> float:
    """Share of batches whose most loaded expert is among the `share` (at least one) of highest forecasts.

    Where several experts share the highest load, any of them counts.
    """
    checked_loads("predicted_BE", predicted_BE)
    checked_loads("load_BE", load_BE)
    num_picked = max(1, math.ceil(share * load_BE.shape[1]))
    picked = np.argsort(-predicted_BE, axis=1, kind="stable")[:, :num_picked]
    is_straggler_BE = load_BE == load_BE.max(axis=1, keepdims=True)
    return float(np.take_along_axis(is_straggler_BE, picked, axis=1).any(axis=1).mean())


def coverage(upper_BE: FloatArray, load_BE: FloatArray) -> float:
    """Share of the loads that are at most their bound."""
    return float((checked_loads("load_BE", load_BE) <= checked_loads("upper_BE", upper_BE)).mean())


def bound_width(upper_BE: FloatArray, load_BE: FloatArray) -> float:
    """Mean over batches of sum bound / sum load: what covering costs. 1 is a bound without slack."""
    checked_loads("upper_BE", upper_BE)
    sums_B = checked_loads("load_BE", load_BE).sum(axis=1)
    used_B = sums_B > 0
    return float((upper_BE.sum(axis=1)[used_B] / sums_B[used_B]).mean()) if used_B.any() else 0.0
