"""Inputs of planners: a system, a policy, observations; and planning tick by tick."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.plan import Plan
from moeless.core.policy import ResolvedPolicy, parse_policy, resolve
from moeless.planning.observation import Observation, Planner
from moeless.planning.planner import MoelessPlanner, PlanningContext
from tests.support.planning import model_of


def observed(
    load: list[list[float]] | FloatArray,
    *,
    time_s: float = 0.0,
    upper: list[list[float]] | FloatArray | None = None,
    used_s: list[list[float]] | FloatArray | None = None,
    pending: list[int] | IntArray | None = None,
) -> Observation:
    """Functions with load are in use now, others never were unless given."""
    load_LE = np.array(load, dtype=np.float64)
    return Observation(
        time_s=time_s,
        mean_LE=load_LE,
        upper_LE=load_LE if upper is None else np.array(upper),
        window_LE=load_LE,
        last_used_s_LE=np.where(load_LE > 0, time_s, -np.inf) if used_s is None else np.array(used_s),
        num_steps=int(time_s),
        pending_keys=np.array([] if pending is None else pending, dtype=np.int64),
    )


def system(num_layers: int, num_experts: int, cluster: Cluster, **changed: Any) -> PlanningContext:
    return PlanningContext(model=model_of(num_layers, num_experts), cluster=cluster, **changed)


def policy(model: ModelShape, *, tick_s: float = 1.0, **defaults: Any) -> ResolvedPolicy:
    return resolve(parse_policy({"tickSeconds": tick_s, "defaults": defaults}), model)


def moeless(planned: PlanningContext, **defaults: Any) -> MoelessPlanner:
    return MoelessPlanner(policy(planned.model, **defaults), planned)


def ticks(planner: Planner, loads: list[list[list[float]]], *, tick_s: float = 1.0) -> list[Plan]:
    """A plan for each load, one after the other; functions keep when they were used last."""
    plans: list[Plan] = []
    used_s = np.full(np.shape(loads[0]), -np.inf)
    for tick, load in enumerate(loads):
        used_s = np.where(np.array(load) > 0, tick * tick_s, used_s)
        observation = observed(load, time_s=tick * tick_s, used_s=used_s)
        plans.append(planner.plan(observation, plans[-1] if plans else None))
    return plans
