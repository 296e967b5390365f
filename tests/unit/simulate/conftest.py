from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeless.core.cluster import Cluster, ModelShape, even_cluster
from moeless.core.plan import Plan
from moeless.planning.cost import BackboneTime, CostProfile, ExchangeTime, ExpertTime
from moeless.planning.observation import Observation
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import synthetic_trace

EXPERT_BYTES = 1_000_000


class FixedPlanner:
    """Plans in turn, one a call; the last stays. Remembers what it was told."""

    name = "fixed"

    def __init__(self, *plans: Plan) -> None:
        self.plans = list(plans)
        self.observations: list[Observation] = []

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        self.observations.append(observation)
        if len(self.plans) > 1:
            return self.plans.pop(0)
        return self.plans[0] if previous is None or previous.version < self.plans[0].version else previous


def spread_plan(num_layers: int, num_experts: int, num_workers: int, *, version: int = 1, turn: int = 0) -> Plan:
    """Place contiguous experts on each worker, rotated by a number of workers."""
    layer_N, expert_N = np.divmod(np.arange(num_layers * num_experts), num_experts)
    return Plan.from_instances(
        version=version,
        num_layers=num_layers,
        num_experts=num_experts,
        num_workers=num_workers,
        layer_N=layer_N,
        expert_N=expert_N,
        worker_N=(expert_N * num_workers // num_experts + turn) % num_workers,
        share_N=np.ones(len(layer_N)),
    )


def make_profile(model: ModelShape, **changes: Any) -> CostProfile:
    """1 ms for each call of up to 100 tokens and 10 µs for each token more, backbone 2 ms, free exchange."""
    profile = CostProfile(
        name="test",
        source="made up",
        model=model,
        expert_time=ExpertTime.from_knots([(1, 1e-3), (100, 1e-3), (200, 2e-3)]),
        backbone=BackboneTime(step_s=2e-3, token_s=0, decode_context_s=0, prefill_context_s=0),
        exchange=ExchangeTime(hub_s=0, message_s=0, all_to_all_s=0),
    )
    return replace(profile, **changes)


def make_scenario(
    *, num_layers: int = 3, num_experts: int = 8, top_k: int = 2, num_workers: int = 4, **changes: Any
) -> Scenario:
    routing = SequenceRouting(
        synthetic_trace(
            num_sequences=8, tokens_per_sequence=40, num_layers=num_layers, num_experts=num_experts, top_k=top_k
        )
    )
    model = ModelShape(
        num_layers=num_layers, num_experts=num_experts, top_k=top_k, expert_bytes=EXPERT_BYTES, hidden_bytes=1
    )
    cluster: Cluster = even_cluster(num_workers, memory_bytes=100 * EXPERT_BYTES)
    settings: dict[str, Any] = {
        "profile": make_profile(model),
        "cluster": cluster,
        "routing": routing,
        "arrivals": made_up_arrivals(rate_per_s=20, num_requests=60, prompt_tokens=30, output_tokens=12, length_cv=0.5),
        "batching": BatchingConfig(max_batch_tokens=64, max_running=16),
    }
    return Scenario(**(settings | changes))


@pytest.fixture(name="fixed_planner")
def fixed_planner_fixture() -> type[FixedPlanner]:
    return FixedPlanner


@pytest.fixture(name="spread_plan")
def spread_plan_fixture() -> Callable[..., Plan]:
    return spread_plan


@pytest.fixture(name="make_profile")
def make_profile_fixture() -> Callable[..., CostProfile]:
    return make_profile


@pytest.fixture(name="make_scenario", scope="session")
def make_scenario_fixture() -> Callable[..., Scenario]:
    return make_scenario
