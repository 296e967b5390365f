"""A policy as arrays: what planning reads, for one model.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.alias_generators import to_camel

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import ModelShape
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.policy.tree import BUILTIN, MODEL_SETTINGS, LossyOptions, Placer, Policy, Rule, Scaler, Settings
from moeless.core.policy.values import indices_in, memory_bytes

UNLIMITED = 2**31 - 1
"""Instances, where there is no bound: sums of it over all functions still fit an int64."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ResolvedPolicy:
    """A policy for one model. Arrays must not be written to."""

    tick_s: float
    min_LE: IntArray
    """Minimal number of instances of a function that has any, >= 1."""
    max_LE: IntArray
    scale_to_zero_LE: BoolArray
    keep_alive_s_LE: FloatArray
    forecast_quantile_LE: FloatArray
    up_window_s_LE: FloatArray
    down_window_s_LE: FloatArray
    max_cv_L: FloatArray
    layer_budget_L: IntArray
    """Instances of each layer."""
    budget: int
    """Instances of all layers."""
    scaler: Scaler
    placer: Placer
    max_moves: int | None
    """Instances that one plan may start to balance load."""
    benefit_threshold: float
    lossy: LossyOptions | None


_FUNCTION_SETTINGS = {
    "min_replicas": np.int64,
    "max_replicas": np.int64,
    "scale_to_zero": np.bool_,
    "keep_alive_seconds": np.float64,
    "forecast_quantile": np.float64,
    "scale_up_stabilization_seconds": np.float64,
    "scale_down_stabilization_seconds": np.float64,
}


def resolve(policy: Policy, model: ModelShape, *, model_id: str = "") -> ResolvedPolicy:
    """Lay the rules over the defaults, and those over what is built in.

    Args:
        model_id: the model's name, by which rules choose; without it, those that name models do not apply.
    Raises: ConfigError if a rule names layers or experts that the model does not have, if rules contradict each other
        about a function, or if a budget has no room for the least that must be held.
    """
    rules = _rules_of(policy, model_id)
    arrays: dict[str, NDArray[Any]] = {}
    origins: dict[str, list[str]] = {}
    origin_LE: dict[str, IntArray] = {}
    shape = (model.num_layers, model.num_experts)
    chosen = [(path, settings, *_chosen(path, settings, model)) for path, settings in rules]
    for name, dtype in _FUNCTION_SETTINGS.items():
        builtin = UNLIMITED if name == "max_replicas" else getattr(BUILTIN, name)
        values_LE: NDArray[Any] = np.full(shape, builtin, dtype=dtype)
        by_LE = np.full(shape, -1)
        for index, (_, settings, layers, experts) in enumerate(chosen):
            value = getattr(settings, name)
            if value is not None:
                values_LE[np.ix_(layers, experts)] = value
                by_LE[np.ix_(layers, experts)] = index
        arrays[name], origin_LE[name] = values_LE, by_LE
        origins[name] = [f"{path}.{to_camel(name)}" for path, *_ in chosen]
    _check_bounds(arrays, origins, origin_LE)

    max_cv_L = np.full(model.num_layers, BUILTIN.cv_target, dtype=np.float64)
    layer_budget_L = np.full(model.num_layers, UNLIMITED)
    settled = BUILTIN
    for _, settings, layers, _ in chosen:
        if settings.cv_target is not None:
            max_cv_L[layers] = settings.cv_target
        if settings.layer_memory_budget is not None:
            whole_bytes = model.expert_bytes * model.num_experts
            layer_budget_L[layers] = _instances(settings.layer_memory_budget, whole_bytes, model)
        given = {name: getattr(settings, name) for name in MODEL_SETTINGS if getattr(settings, name) is not None}
        settled = settled.model_copy(update=given)
    all_bytes = model.expert_bytes * model.num_experts * model.num_layers
    budget = UNLIMITED if settled.memory_budget is None else _instances(settled.memory_budget, all_bytes, model)
    assert settled.scaler is not None
    assert settled.placer is not None
    assert settled.benefit_threshold is not None
    resolved = ResolvedPolicy(
        tick_s=policy.tick_seconds,
        min_LE=arrays["min_replicas"],
        max_LE=arrays["max_replicas"],
        scale_to_zero_LE=arrays["scale_to_zero"],
        keep_alive_s_LE=arrays["keep_alive_seconds"],
        forecast_quantile_LE=arrays["forecast_quantile"],
        up_window_s_LE=arrays["scale_up_stabilization_seconds"],
        down_window_s_LE=arrays["scale_down_stabilization_seconds"],
        max_cv_L=max_cv_L,
        layer_budget_L=layer_budget_L,
        budget=budget,
        scaler=settled.scaler,
        placer=settled.placer,
        max_moves=settled.max_moves_per_tick,
        benefit_threshold=settled.benefit_threshold,
        lossy=settled.lossy,
    )
    _check_budgets(resolved)
    return resolved


def _rules_of(policy: Policy, model_id: str) -> list[tuple[str, Settings]]:
    """Those that apply, with their paths."""
    rules: list[tuple[str, Settings]] = [("defaults", policy.defaults)]
    for index, rule in enumerate(policy.rules):
        if rule.models is None or any(fnmatchcase(model_id, pattern) for pattern in rule.models):
            rules.append((f"rules[{index}]", rule))
    return rules


def _chosen(path: str, settings: Settings, model: ModelShape) -> tuple[list[int], list[int]]:
    """Layers and experts that the settings are for."""
    chosen = []
    for name, count in (("layers", model.num_layers), ("experts", model.num_experts)):
        ranges = getattr(settings, name) if isinstance(settings, Rule) else None
        try:
            chosen.append(list(range(count)) if ranges is None else indices_in(ranges, count=count))
        except ValueError as error:
            raise ConfigError(f"{path}.{name} {error}, the model's number of {name}") from error
    return chosen[0], chosen[1]


def _instances(amount: int | str, whole_bytes: int, model: ModelShape) -> int:
    return min(UNLIMITED, memory_bytes(amount, whole_bytes=whole_bytes) // model.expert_bytes)


def _check_bounds(
    arrays: dict[str, NDArray[Any]], origins: dict[str, list[str]], origin_LE: dict[str, IntArray]
) -> None:
    min_LE, max_LE = arrays["min_replicas"], arrays["max_replicas"]
    wrong = np.argwhere(max_LE < min_LE)
    if len(wrong):
        layer, expert = wrong[0]
        by = origins["max_replicas"][origin_LE["max_replicas"][layer, expert]]
        raise ConfigError(
            f"{by} must be >= minReplicas ({min_LE[layer, expert]}) of {FunctionId(int(layer), int(expert))}, "
            f"got {max_LE[layer, expert]}"
        )


def _check_budgets(policy: ResolvedPolicy) -> None:
    held_L = (policy.min_LE * ~policy.scale_to_zero_LE).sum(axis=1)
    wrong = np.flatnonzero(held_L > policy.layer_budget_L)
    if len(wrong):
        raise ConfigError(
            f"layerMemoryBudget must have room for the {held_L[wrong[0]]} instances that layer {wrong[0]} never goes "
            f"below, got room for {policy.layer_budget_L[wrong[0]]}"
        )
    if held_L.sum() > policy.budget:
        raise ConfigError(
            f"memoryBudget must have room for the {held_L.sum()} instances that the model never goes below, "
            f"got room for {policy.budget}"
        )
