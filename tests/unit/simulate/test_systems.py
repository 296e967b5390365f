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
from moeless.simulate.forecasts import PredictedRouting
from moeless.simulate.report.results import SystemResult
from moeless.simulate.scenario import Scenario, System
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import (
    SYSTEMS,
    SystemConfig,
    described_systems,
    make_systems,
    routing_statistics,
    spare_choices,
    usual_systems,
)
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import ArrivalTrace

MakeScenario = Callable[..., Scenario]


def simulated(scenario: Scenario, *names: str, config: SystemConfig | None = None) -> dict[str, SystemResult]:
    systems = make_systems(scenario, names=names or None, config=config)
    return {system.name: simulate(scenario, system) for system in systems}


def first_plan(scenario: Scenario, system: System) -> Plan:
    """The plan of the system's planner before anything is served."""
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


def test_moeless_forecasts_by_what_it_could_have(make_scenario: MakeScenario) -> None:
    names = ["moeless", "moeless-window", "moeless-popularity", "moeless-paper", "foresight"]
    moeless, window, popularity, paper, foresight = make_systems(make_scenario(), names=names)
    assert [system.forecast.kind for system in (moeless, window, popularity, paper)] == [
        *("popularity", "window", "popularity", "popularity")
    ]
    assert moeless.prefetch_layers == 0  # nothing says which functions are needed
    assert (foresight.forecast.kind, foresight.forecast.recall) == ("foresight", 1.0)
    assert not moeless.is_prefetch_in_time
    assert foresight.is_prefetch_in_time


def test_a_recall_is_an_assumption(make_scenario: MakeScenario) -> None:
    moeless, popularity = make_systems(
        make_scenario(), names=["moeless", "moeless-popularity"], config=SystemConfig(recall=0.7)
    )
    assert (moeless.forecast.kind, moeless.forecast.recall, moeless.prefetch_recall) == ("foresight", 0.7, 0.7)
    assert (popularity.forecast.kind, popularity.prefetch_layers) == ("popularity", 0)
    papers = [make_systems(make_scenario(), names=["moeless-paper"], config=SystemConfig(recall=r)) for r in (None, 0)]
    assert [paper.prefetch_recall for (paper,) in papers] == [0.84, 0]
    with pytest.raises(ConfigError, match="forecast.recall must be from 0 to 1, got 1.5"):
        SystemConfig(recall=1.5)
    with pytest.raises(ConfigError, match="forecast.recall must not be given with predictors"):
        SystemConfig(recall=0.5, predicted=PredictedRouting(spans=make_scenario().routing, recall=0.6))


class Told:
    """Predicts that every token goes to the first experts; notes the parts of requests that it is asked about."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def of_span(self, sequence: int, first: int, num_tokens: int) -> Any:
        del sequence
        self.spans.append((first, first + num_tokens))
        load_LE = np.zeros((3, 8))
        load_LE[:, :2] = num_tokens
        return load_LE.reshape(-1)


def test_moeless_forecasts_with_predictors_where_there_are_some(make_scenario: MakeScenario) -> None:
    scenario, told = make_scenario(), Told()
    config = SystemConfig(predicted=PredictedRouting(spans=told, recall=0.6))
    moeless, window, foresight = make_systems(scenario, names=["moeless", "moeless-window", "foresight"], config=config)
    assert (moeless.forecast.kind, moeless.prefetch_layers, moeless.prefetch_recall) == ("predictor", 3, 0.6)
    assert (window.forecast.kind, window.predicted, foresight.predicted) == ("window", None, None)
    simulate(scenario, moeless)
    assert told.spans


def forecasts_of(scenario: Scenario, system: System, until_s: float) -> list[FloatArray]:
    """Observations that the planner is given, for ticks up to a time."""
    seen: list[FloatArray] = []

    class Watched:
        name = system.planner.name

        def plan(self, observation: Observation, previous: Plan | None) -> Plan:
            if 0 < observation.time_s <= until_s:
                seen.append(observation.mean_LE)
            return system.planner.plan(observation, previous)

    simulate(scenario, replace(system, planner=Watched()))
    return seen


@pytest.mark.parametrize("name", ["moeless", "moeless-window", "moeless-popularity", "foresight"])
def test_only_foresight_knows_requests_to_come_and_how_long_answers_get(name: str, make_scenario: MakeScenario) -> None:
    policy = parse_policy({"tickSeconds": 0.1})
    config = SystemConfig(
        policy=policy,
        predicted=PredictedRouting(spans=Told(), recall=0.6) if name == "moeless" else None,
    )
    scenario = make_scenario()
    arrivals, until_s = scenario.arrivals, 0.35
    later = np.asarray(arrivals.arrival_s) > until_s
    others = ArrivalTrace.from_arrays(
        arrival_s=np.where(later, np.asarray(arrivals.arrival_s) + 0.3, arrivals.arrival_s),
        prompt_tokens=np.where(later, 3, arrivals.prompt_tokens),
        output_tokens=np.full(arrivals.num_requests, 400),  # none of which is over by then
        source="",
    )
    longer = arrivals_longer(others)
    found = []
    for known in (others, longer):
        (system,) = make_systems(scenario, names=[name], config=config)
        found.append(forecasts_of(replace(scenario, arrivals=known), system, until_s))
    assert len(found[0]) >= 3
    assert all(mean_LE.any() for mean_LE in found[0])
    alike = [np.array_equal(one, other) for one, other in zip(*found, strict=True)]
    assert all(alike) == (name != "foresight")


def arrivals_longer(arrivals: ArrivalTrace) -> ArrivalTrace:
    """The same, but a fifth of the requests come at once at 0.36 s, and answers are longer."""
    arrival_s = np.asarray(arrivals.arrival_s)
    return ArrivalTrace.from_arrays(
        arrival_s=np.where(arrival_s > 0.35, 0.36, arrival_s),
        prompt_tokens=arrivals.prompt_tokens,
        output_tokens=np.full(arrivals.num_requests, 500),
        source="",
    )


def test_lp_splits_each_step_with_sglangs_plans_and_pays_for_it(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(batching=BatchingConfig(max_batch_tokens=2000))
    names = ["eplb-sglang", "lp"]
    config = SystemConfig(eplb_spare_replicas=1)
    eplb, lp = make_systems(scenario, names=names, config=config)
    assert (lp.split, lp.split_s, lp.topology) == ("lp", 150e-6, "all_to_all")
    assert (first_plan(scenario, lp).counts_LE == first_plan(scenario, eplb).counts_LE).all()
    charged, free, by_shares = (
        simulate(scenario, system)
        for system in (
            *make_systems(scenario, names=["lp"], config=config),
            replace(make_systems(scenario, names=["lp"], config=config)[0], split_s=0.0),
            *make_systems(scenario, names=["eplb-sglang"], config=config),
        )
    )
    assert free.imbalance < by_shares.imbalance
    assert charged.layer_s.mean > free.layer_s.mean


def test_the_split_is_charged_in_layers_with_replicas(make_scenario: MakeScenario) -> None:
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=30, output_tokens=4)
    scenario = make_scenario(arrivals=arrivals)

    def mean_s(spare: int, split_s: float) -> float:
        (lp,) = make_systems(scenario, names=["lp"], config=SystemConfig(eplb_spare_replicas=spare))
        return simulate(scenario, replace(lp, split_s=split_s, split_token_s=0.0)).layer_s.mean

    assert mean_s(1, 1e-3) == pytest.approx(mean_s(1, 0.0) + 1e-3)
    assert mean_s(0, 1e-3) == pytest.approx(mean_s(0, 0.0))


def test_moeless_pays_for_its_split_as_the_profile_says(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    exchange = replace(scenario.profile.exchange, split_s=3e-5, split_token_s=1e-8)
    (moeless,) = make_systems(
        replace(scenario, profile=replace(scenario.profile, exchange=exchange)), names=["moeless"]
    )
    assert (moeless.split, moeless.split_s, moeless.split_token_s) == ("balanced", 3e-5, 1e-8)


def test_exact_load_lies_between_moeless_and_whole_experts(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    results = simulated(scenario, "moeless", "exact-load", "whole-experts")
    layer_s = {name: result.layer_s.mean for name, result in results.items()}
    assert layer_s["whole-experts"] <= layer_s["exact-load"] < layer_s["moeless"]
    assert results["exact-load"].num_starts == 0


def test_exact_load_has_the_instances_that_the_policy_gives_moeless(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()

    def instances(share: float, scenario: Scenario) -> int:
        policy = parse_policy({"defaults": {"scaler": {"name": "minMax", "maxExtraShare": share}}})
        (system,) = make_systems(scenario, names=["exact-load"], config=SystemConfig(policy=policy))
        return system.bound_instances

    assert [instances(share, scenario) for share in (0, 0.25, 1.5)] == [8, 10, 20]
    small = replace(scenario, cluster=even_cluster(4, memory_bytes=9 * 1_000_000))
    assert instances(1.5, small) == 12  # four workers with room for nine instances, three layers


def test_without_a_number_of_spare_replicas_eplb_is_tried_with_none_and_one() -> None:
    assert [choice.eplb_spare_replicas for choice in spare_choices("eplb-vllm", SystemConfig())] == [0, 1]
    given = SystemConfig(eplb_spare_replicas=2)
    assert spare_choices("eplb-vllm", given) == [given]
    assert len(spare_choices("lp", SystemConfig())) == len(spare_choices("static", SystemConfig())) == 1


def test_popularity_is_not_shown_twice() -> None:
    assert "moeless-popularity" not in usual_systems(has_predictors=False)
    assert usual_systems(has_predictors=True) == list(SYSTEMS)


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
