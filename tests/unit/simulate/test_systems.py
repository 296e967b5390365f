from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeless.core.arrays import FloatArray
from moeless.core.cluster import even_cluster
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.core.policy import parse_policy
from moeless.planning.baselines.eplb import EplbPlanner
from moeless.planning.observation import Observation
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.report.results import SystemResult
from moeless.simulate.scenario import Scenario, System
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import (
    SYSTEMS,
    SystemConfig,
    described_systems,
    make_systems,
    routing_statistics,
)
from moeless.simulate.workload import made_up_arrivals

MakeScenario = Callable[..., Scenario]


def simulated(scenario: Scenario, *names: str, config: SystemConfig | None = None) -> dict[str, SystemResult]:
    systems = make_systems(scenario, names=names or None, config=config)
    return {system.name: simulate(scenario, system) for system in systems}


def first_plan(scenario: Scenario, system: System) -> Plan:
    """What the system's planner makes before anything is served."""
    plans: list[Plan] = []

    class Watched:
        name = system.planner.name

        def plan(self, observation: Observation, previous: Plan | None) -> Plan:
            plans.append(system.planner.plan(observation, previous))
            return plans[-1]

    simulate(scenario, replace(system, planner=Watched()))
    return plans[0]


def test_every_standard_policy_serves_every_token(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    results = simulated(scenario)
    assert list(results) == list(SYSTEMS)
    arrivals = scenario.arrivals
    expected = int((arrivals.prompt_tokens + arrivals.output_tokens - 1).sum())
    assert {result.num_tokens for result in results.values()} == {expected}


def test_no_policy_has_faster_layers_than_the_limit(make_scenario: MakeScenario) -> None:
    results = simulated(make_scenario())
    assert min(results, key=lambda name: results[name].layer_s.mean) == "limit"
    assert results["limit"].num_starts == 0


def test_policies_are_made_anew_so_that_a_second_run_gives_the_same(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    assert simulated(scenario, "moeless", "moeless-paper") == simulated(scenario, "moeless", "moeless-paper")


def test_eplb_has_spare_instances_and_replans_every_so_many_steps(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    vllm, sglang = make_systems(scenario, names=["eplb-vllm", "eplb-sglang"])
    assert (vllm.interval_steps, vllm.window_steps, vllm.is_blocking) == (3000, 1000, True)
    assert (sglang.interval_steps, sglang.window_steps, sglang.is_blocking) == (1000, 1000, True)
    result = simulate(scenario, vllm)
    assert result.peak_instances == 3 * (8 + 4)
    none = simulated(scenario, "eplb-vllm", config=SystemConfig(eplb_spare_replicas=0))["eplb-vllm"]
    assert none.peak_instances == 3 * 8


def test_no_more_spare_instances_are_asked_for_than_there_can_be(make_scenario: MakeScenario) -> None:
    (system,) = make_systems(make_scenario(), names=["eplb-vllm"], config=SystemConfig(eplb_spare_replicas=7))
    assert isinstance(system.planner, EplbPlanner)
    assert system.planner.spare_replicas == 8 * 3


def test_spare_instances_that_do_not_fit_are_refused(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(cluster=even_cluster(4, memory_bytes=8 * 1_000_000))
    with pytest.raises(ConfigError, match="eplb_spare_replicas must leave room.*holds 9 instances, and 8 fit"):
        make_systems(scenario, names=["eplb-sglang"])
    assert simulated(scenario, "static")["static"].num_starts == 0


def test_moeless_follows_the_policy_document(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    policy = parse_policy(
        {"tickSeconds": 0.25, "defaults": {"scaleToZero": False}, "rules": [{"models": ["small"], "minReplicas": 2}]}
    )
    config = SystemConfig(policy=policy)
    (system,) = make_systems(scenario, names=["moeless"], config=config)
    assert system.interval_s == 0.25
    assert simulate(scenario, system).peak_instances >= 24
    doubled = simulated(scenario, "moeless", config=replace(config, model_id="small"))["moeless"]
    assert doubled.peak_instances >= 48


def test_a_policy_that_places_by_affinity_is_told_of_the_routing(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    policy = parse_policy({"tickSeconds": 0.25, "defaults": {"placer": {"name": "affinity", "maxImbalance": 1.5}}})
    config = SystemConfig(policy=policy)
    systems = make_systems(scenario, names=["static", "moeless", "foresight"], config=config)
    static, moeless, foresight = described_systems(systems, config).values()
    assert "by the affinity of 320 tokens of the very routing that is simulated" in moeless
    assert "affinity" not in static + foresight
    assert simulate(scenario, systems[1]).num_requests == 60
    assert simulated(scenario, "moeless", config=config) != simulated(scenario, "moeless")
    gathered = replace(config, affinity=routing_statistics(scenario.routing))
    assert simulated(scenario, "moeless", config=gathered) == simulated(scenario, "moeless", config=config)


def test_moeless_forecasts_with_the_measured_recall_and_foresight_without_error(make_scenario: MakeScenario) -> None:
    moeless, foresight = make_systems(make_scenario(), names=["moeless", "foresight"])
    assert (moeless.forecast.kind, moeless.forecast.recall, moeless.prefetch_recall) == ("foresight", 0.84, 0.84)
    assert (foresight.forecast.kind, foresight.forecast.recall) == ("foresight", 1.0)
    assert not moeless.is_prefetch_in_time
    assert foresight.is_prefetch_in_time


def test_moeless_forecasts_with_predictors_where_there_are_some(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()

    class Told:
        num_calls = 0

        def of_span(self, sequence: int, first: int, num_tokens: int) -> Any:
            self.num_calls += 1
            return np.full(24, num_tokens * 2 / 8)

    told = Told()
    moeless, foresight = make_systems(scenario, names=["moeless", "foresight"], config=SystemConfig(predicted=told))
    assert moeless.forecast.kind == "predictor"
    assert foresight.predicted is None
    simulate(scenario, moeless)
    assert told.num_calls > 0


def test_the_first_plan_is_for_what_was_recorded_before(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(batching=BatchingConfig(max_batch_tokens=1000))
    prior_LE = np.full((3, 8), 0.1)
    prior_LE[:, 5] = 1.3  # more than half of all tokens
    names = ["static", "eplb-vllm", "eplb-sglang", "moeless-paper", "moeless"]
    without = make_systems(scenario, names=names)
    knowing = make_systems(scenario, names=names, config=SystemConfig(prior_LE=prior_LE))
    told = described_systems(knowing, SystemConfig())
    for before, system in zip(without, knowing, strict=True):
        knows = system.name not in ("static", "eplb-vllm")
        assert ("begins with a plan for the load recorded before" in told[f"system {system.name}"]) == knows
        counts_LE = first_plan(scenario, system).counts_LE
        assert not knows or (counts_LE[:, 5] == counts_LE.max()).all()
        assert (counts_LE != first_plan(scenario, before).counts_LE).any() == knows


@pytest.mark.parametrize(
    ("prior_LE", "message"),
    [
        (np.ones((3, 4)), r"prior_LE must be finite, >= 0 and of \(3, 8\) layers and experts, got \(3, 4\)"),
        (np.full((3, 8), np.nan), "prior_LE must be finite and >= 0, got nan for expert 0 of layer 0"),
        (np.full((3, 8), -1.0), "prior_LE must be finite and >= 0, got -1 for expert 0 of layer 0"),
    ],
)
def test_a_record_that_cannot_be_is_refused(prior_LE: FloatArray, message: str, make_scenario: MakeScenario) -> None:
    with pytest.raises(ConfigError, match=message):
        make_systems(make_scenario(), config=SystemConfig(prior_LE=prior_LE))


def test_without_a_record_the_first_plan_is_for_equal_loads(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    systems = make_systems(scenario, names=["eplb-sglang", "moeless"])
    told = described_systems(systems, SystemConfig())
    assert all("begins with a plan for equal loads" in words for words in told.values())
    assert (first_plan(scenario, systems[1]).counts_LE == 1).all()


def test_functions_that_are_foreseen_are_never_waited_for(make_scenario: MakeScenario) -> None:
    arrivals = made_up_arrivals(rate_per_s=0.5, num_requests=8, prompt_tokens=30, output_tokens=4)
    scenario = make_scenario(arrivals=arrivals)
    slow = replace(scenario, cluster=replace(scenario.cluster, fetch_bytes_per_s=1e7))
    policy = parse_policy({"defaults": {"keepAliveSeconds": 0, "scaleDownStabilizationSeconds": 0}})
    results = simulated(slow, "moeless", "foresight", config=SystemConfig(policy=policy))
    assert min(result.num_cold_starts for result in results.values()) > 0
    assert results["moeless"].layer_s.cdf[100] > 0.1
    assert results["foresight"].layer_s.cdf[100] < 0.1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["static", "best"], "systems must be among static, .*limit, got best"),
        ([], "systems must be among .*, got none"),
        (["static", "static"], "systems must differ, got static, static"),
    ],
)
def test_policies_that_are_not_there_are_refused(names: list[str], message: str, make_scenario: MakeScenario) -> None:
    with pytest.raises(ConfigError, match=message):
        make_systems(make_scenario(), names=names)


@pytest.mark.parametrize("field", ["eplb_spare_replicas", "prefetch_layers", "paper_prefetch_layers"])
def test_counts_are_not_negative(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least 0, got -1"):
        SystemConfig(**{field: -1})  # type: ignore[arg-type]
