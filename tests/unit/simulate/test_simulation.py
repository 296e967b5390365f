from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from moeless.core.cluster import ModelShape, even_cluster
from moeless.core.plan import Plan
from moeless.planning.cost import BackboneTime, CostProfile, ExchangeTime
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.forecasts import ForecastConfig
from moeless.simulate.report.results import SystemResult
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, System, TransferConfig
from moeless.simulate.simulation import simulate
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import ArrivalTrace, RoutingTrace, TraceMetadata

MakeScenario = Callable[..., Scenario]
MakePlan = Callable[..., Plan]


def round_robin_routing(num_experts: int, top_k: int, num_layers: int = 1) -> SequenceRouting:
    """Every expert of every layer gets the same."""
    rows = np.arange(num_experts)[:, np.newaxis] + np.arange(top_k)
    experts = np.repeat((rows % num_experts)[:, np.newaxis, :], num_layers, axis=1)
    return SequenceRouting(
        RoutingTrace.from_arrays(
            TraceMetadata(model="even", num_experts=num_experts, top_k=top_k, num_layers=num_layers),
            experts_TLk=experts,
            weights_TLk=np.full(experts.shape, 1 / top_k),
            sequence_lengths_S=[num_experts],
        )
    )


def served_one_by_one(arrivals: ArrivalTrace, make_profile: Callable[..., CostProfile], planner: Any) -> SystemResult:
    """Requests of one token, one at a time: 1 ms of backbone and 1 ms of the only expert each."""
    scenario = Scenario(
        profile=make_profile(
            ModelShape(num_layers=1, num_experts=1, top_k=1, expert_bytes=1, hidden_bytes=1),
            backbone=BackboneTime(step_s=1e-3, token_s=0, decode_context_s=0, prefill_context_s=0),
        ),
        cluster=even_cluster(1, memory_bytes=1),
        routing=round_robin_routing(1, 1),
        arrivals=arrivals,
        batching=BatchingConfig(max_batch_tokens=1, max_running=1),
    )
    return simulate(scenario, System(name="one", planner=planner, topology="all_to_all"))


def one_instance() -> Plan:
    return Plan.from_dense(np.ones((1, 1, 1), dtype=bool), np.ones((1, 1, 1)), version=1)


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_waiting_at_a_server_of_constant_service_is_that_of_m_d_1(
    utilisation: float, make_profile: Callable[..., CostProfile], fixed_planner: Any
) -> None:
    service_s = 2e-3
    means = []
    for seed in range(6):
        arrivals = made_up_arrivals(
            rate_per_s=utilisation / service_s, num_requests=4000, prompt_tokens=1, output_tokens=1, seed=seed
        )
        means.append(served_one_by_one(arrivals, make_profile, fixed_planner(one_instance())).ttft_s.mean)
    expected_s = service_s + utilisation * service_s / (2 * (1 - utilisation))
    error_s = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means) - expected_s) < 4 * error_s
    assert error_s < 0.05 * expected_s


def test_requests_that_come_as_fast_as_they_are_served_never_wait(
    make_profile: Callable[..., CostProfile], fixed_planner: Any
) -> None:
    arrivals = made_up_arrivals(rate_per_s=500, num_requests=50, prompt_tokens=1, output_tokens=1, gap_cv=0)
    result = served_one_by_one(arrivals, make_profile, fixed_planner(one_instance()))
    assert result.ttft_s.p99 == pytest.approx(2e-3)


def balanced_scenario(make_profile: Callable[..., CostProfile], **changes: Any) -> Scenario:
    """One prompt of 800 tokens: 200 pairs for each of 8 experts, 2 on each of 4 workers, in each of 3 layers."""
    settings: dict[str, Any] = {
        "profile": make_profile(
            ModelShape(num_layers=3, num_experts=8, top_k=2, expert_bytes=10, hidden_bytes=1000),
            exchange=ExchangeTime(hub_s=1e-4, message_s=1e-5, all_to_all_s=3e-4, combine_ratio=2),
        ),
        "cluster": replace(even_cluster(4, memory_bytes=1000), local_bytes_per_s=1e9),
        "routing": round_robin_routing(8, 2, num_layers=3),
        "arrivals": made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=800, output_tokens=1),
        "batching": BatchingConfig(max_batch_tokens=800, max_running=1),
    }
    return Scenario(**(settings | changes))


# Experts 2w and 2w+1 are on worker w. Tokens choose (e, e+1): of 8 tokens one has both on w and two have one there, so
# each worker gets 400 pairs of 300 distinct tokens.
BUSY_S = 2 * 2e-3
HUB_S = 2 * (1e-4 + 4e-5) + 300 * (1000 + 2000) / 1e9
ALL_TO_ALL_S = 2 * 3e-4 + 300 * 3 / 4 * (1000 + 2000) / 1e9


@pytest.mark.parametrize(("topology", "exchange_s"), [("hub", HUB_S), ("all_to_all", ALL_TO_ALL_S)])
def test_balanced_load_takes_as_long_as_computed_by_hand(
    topology: Any,
    exchange_s: float,
    make_profile: Callable[..., CostProfile],
    spread_plan: MakePlan,
    fixed_planner: Any,
) -> None:
    scenario = balanced_scenario(make_profile)
    result = simulate(scenario, System(name="even", planner=fixed_planner(spread_plan(3, 8, 4)), topology=topology))
    layer_s = BUSY_S + exchange_s
    assert result.moe_s == pytest.approx(3 * layer_s)
    assert result.duration_s == pytest.approx(2e-3 + 3 * layer_s)
    assert result.ttft_s.mean == pytest.approx(result.duration_s)
    assert result.imbalance == pytest.approx(1.0)
    assert result.billed_byte_s == pytest.approx(3 * layer_s * 8 * 10)
    assert result.resident_byte_s == pytest.approx(result.duration_s * 24 * 10)


def test_with_balanced_load_the_bound_computes_as_long_as_the_plan(
    make_profile: Callable[..., CostProfile], spread_plan: MakePlan, fixed_planner: Any
) -> None:
    free = ExchangeTime(hub_s=0, message_s=0, all_to_all_s=0)
    scenario = balanced_scenario(make_profile)
    scenario = replace(
        scenario,
        profile=replace(scenario.profile, exchange=free),
        cluster=replace(scenario.cluster, local_bytes_per_s=1e30),
    )
    planned, bound = (
        simulate(scenario, System(name="x", planner=fixed_planner(spread_plan(3, 8, 4)), bound=bound))
        for bound in (None, "fluid")
    )
    assert bound.moe_s == pytest.approx(planned.moe_s)


def test_no_plan_is_faster_than_the_bound(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario()
    planned, bound = (
        simulate(scenario, System(name="x", planner=fixed_planner(spread_plan(3, 8, 4)), bound=bound))
        for bound in (None, "fluid")
    )
    assert bound.layer_s.mean < planned.layer_s.mean


@pytest.mark.parametrize("num_engines", [1, 3])
def test_every_token_is_served_once(
    num_engines: int, make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario(num_engines=num_engines)
    result = simulate(scenario, System(name="x", planner=fixed_planner(spread_plan(3, 8, 4))))
    arrivals = scenario.arrivals
    assert result.num_tokens == int((arrivals.prompt_tokens + arrivals.output_tokens - 1).sum())
    assert 0 < result.ttft_s.cdf[0] <= result.request_s.cdf[0]
    assert result.series.time_s == sorted(result.series.time_s)


@pytest.mark.parametrize("num_engines", [1, 3])
def test_the_same_scenario_gives_the_same_result(
    num_engines: int, make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    def run(seed: int) -> SystemResult:
        scenario = make_scenario(num_engines=num_engines, seed=seed)
        return simulate(scenario, System(name="x", planner=fixed_planner(spread_plan(3, 8, 4))))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_layers_as_events_take_as_long_as_all_at_once(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    """A second engine that gets nothing changes nothing but the backbone's share of the devices, which is free here."""
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=300, output_tokens=20)
    alone, beside = (
        simulate(
            make_scenario(arrivals=arrivals, num_engines=num_engines),
            System(name="x", planner=fixed_planner(spread_plan(3, 8, 4)), topology="all_to_all"),
        )
        for num_engines in (1, 2)
    )
    assert beside.moe_s == pytest.approx(alone.moe_s)
    assert beside.duration_s == pytest.approx(alone.duration_s)
    assert beside.billed_byte_s == pytest.approx(alone.billed_byte_s)


def test_engines_that_share_workers_wait_for_each_other(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    arrivals = made_up_arrivals(rate_per_s=1e6, num_requests=4, prompt_tokens=60, output_tokens=20)
    alone, beside = (
        simulate(
            make_scenario(
                arrivals=arrivals, num_engines=num_engines, batching=BatchingConfig(max_batch_tokens=60, max_running=1)
            ),
            System(name="x", planner=fixed_planner(spread_plan(3, 8, 4))),
        )
        for num_engines in (1, 4)
    )
    assert beside.layer_s.mean > 1.2 * alone.layer_s.mean
    assert beside.duration_s < alone.duration_s


def test_a_changed_plan_serves_once_its_instances_are_loaded(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario()
    planner = fixed_planner(spread_plan(3, 8, 4), spread_plan(3, 8, 4, version=2, turn=1))
    result = simulate(scenario, System(name="x", planner=planner, interval_s=0.5))
    assert result.num_plans == 1
    assert result.num_starts == 24
    assert result.moved_bytes == 24 * 1_000_000
    assert result.peak_instances == 48
    assert result.stall_s == 0
    assert result.num_cold_starts == 0


def test_engines_stall_while_a_blocking_policy_moves_weights(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario()
    planner = fixed_planner(spread_plan(3, 8, 4), spread_plan(3, 8, 4, version=2, turn=1))
    result = simulate(scenario, System(name="x", planner=planner, interval_steps=20, is_blocking=True))
    assert result.stall_s == pytest.approx(6 * 1e6 / scenario.cluster.local_bytes_per_s)
    still = simulate(scenario, System(name="x", planner=fixed_planner(spread_plan(3, 8, 4))))
    assert result.num_tokens == still.num_tokens


def test_loads_in_the_background_slow_the_exchange_on_a_shared_link(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario()
    scenario = replace(
        scenario,
        profile=replace(scenario.profile, model=replace(scenario.profile.model, hidden_bytes=1_000_000)),
        cluster=replace(scenario.cluster, fetch_bytes_per_s=1e7),
        transfers=TransferConfig(transfer_share=0.9),
    )

    def moe_s(transfers: TransferConfig, *plans: Plan) -> float:
        system = System(name="x", planner=fixed_planner(*plans), interval_s=0.1)
        return simulate(replace(scenario, transfers=transfers), system).moe_s

    before, after = spread_plan(3, 8, 4), spread_plan(3, 8, 4, version=2, turn=1)
    still = moe_s(TransferConfig(transfer_share=0.9), before)
    assert moe_s(TransferConfig(transfer_share=0.9), before, after) > still
    assert moe_s(TransferConfig(transfer_share=0), before) == still


def empty_plan(version: int = 1) -> Plan:
    nothing = np.zeros((3, 8, 4))
    return Plan.from_dense(nothing.astype(bool), nothing, version=version)


def test_tokens_that_meet_no_instance_wait_for_a_cold_start(make_scenario: MakeScenario, fixed_planner: Any) -> None:
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=40, output_tokens=1)
    scenario = make_scenario(arrivals=arrivals)
    result = simulate(scenario, System(name="cold", planner=fixed_planner(empty_plan())))
    used = int((scenario.routing.of_span(0, 0, 40) > 0).sum())
    assert 0 < result.num_cold_starts <= 24
    assert result.num_cold_starts == pytest.approx(used, abs=4)  # of the sequence drawn
    assert result.peak_instances == result.num_cold_starts
    # Four workers load the first layer's experts side by side, two each.
    assert result.moe_s > 2 * 1e6 / scenario.cluster.fetch_bytes_per_s


def test_prefetching_hides_a_cold_start_behind_the_layers_before(
    make_scenario: MakeScenario, fixed_planner: Any
) -> None:
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=40, output_tokens=1)
    scenario = make_scenario(arrivals=arrivals)
    scenario = replace(scenario, cluster=replace(scenario.cluster, fetch_bytes_per_s=1e9))
    moe_s = [
        simulate(
            scenario,
            System(name="x", planner=fixed_planner(empty_plan()), prefetch_layers=ahead, prefetch_recall=recall),
        ).moe_s
        for ahead, recall in ((0, 1.0), (1, 0.5), (1, 1.0), (2, 1.0))
    ]
    assert moe_s[0] >= moe_s[1] >= moe_s[2] >= moe_s[3]
    assert moe_s[0] > moe_s[2]


def test_cold_starts_of_several_engines_are_waited_for_too(make_scenario: MakeScenario, fixed_planner: Any) -> None:
    result = simulate(make_scenario(num_engines=2), System(name="x", planner=fixed_planner(empty_plan())))
    assert result.num_cold_starts == 24
    assert result.layer_s.cdf[100] > 1e6 / 24.8e9


def test_a_worker_that_was_stopped_takes_its_start_up(make_scenario: MakeScenario, fixed_planner: Any) -> None:
    scenario = make_scenario(
        transfers=TransferConfig(worker_idle_s=0.0),
        arrivals=made_up_arrivals(rate_per_s=1, num_requests=2, prompt_tokens=40, output_tokens=1, gap_cv=0),
    )
    result = simulate(scenario, System(name="x", planner=fixed_planner(empty_plan())))
    assert result.num_worker_starts == 4
    assert result.ttft_s.cdf[100] > 10
    assert result.worker_s < 4 * result.duration_s


def test_billed_memory_is_never_above_resident_memory(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    plans = spread_plan(3, 8, 4), spread_plan(3, 8, 4, version=2, turn=1)
    for planner, blocking in (
        (fixed_planner(*plans), False),
        (fixed_planner(*plans), True),
        (fixed_planner(empty_plan()), False),
    ):
        result = simulate(make_scenario(), System(name="x", planner=planner, interval_s=0.3, is_blocking=blocking))
        assert 0 < result.billed_byte_s < result.resident_byte_s


def test_goodput_counts_the_requests_that_keep_the_slo(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    system = System(name="x", planner=fixed_planner(spread_plan(3, 8, 4)))
    scenario = make_scenario()
    result = simulate(scenario, system)
    half = simulate(scenario, system, slo=(result.ttft_s.p50, 1e9))
    assert half.slo_share == pytest.approx(0.5, abs=0.02)
    assert half.goodput_per_s == pytest.approx(0.5 * 60 / half.duration_s, rel=0.05)
    assert result.goodput_per_s is None


def test_a_result_survives_json(make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any) -> None:
    result = simulate(make_scenario(), System(name="x", planner=fixed_planner(spread_plan(3, 8, 4))))
    assert msgspec.json.decode(msgspec.json.encode(result), type=SystemResult) == result


def test_planners_are_told_what_was_and_what_will_be(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    scenario = make_scenario()
    planner = fixed_planner(spread_plan(3, 8, 4))
    system = System(name="x", planner=planner, interval_s=0.25, window_s=0.5, forecast=ForecastConfig(kind="foresight"))
    simulate(scenario, system)
    first, *later = planner.observations
    assert first.num_steps == 0
    assert (first.mean_LE == 16).all()  # a full step, spread evenly
    assert [o.time_s for o in later] == pytest.approx(np.arange(1, len(later) + 1) * 0.25)
    assert all((o.upper_LE >= o.mean_LE).all() for o in later)
    # Foresight of a tick and what was then observed are of the same tokens.
    seen = np.mean([o.window_LE for o in later[4:-4]], axis=0)
    foreseen = np.mean([o.mean_LE for o in later[3:-5]], axis=0)
    assert np.abs(seen / seen.sum() - foreseen / foreseen.sum()).sum() < 0.25
    # What is foreseen is of the step that the average token is in: prompts come in few steps of many tokens.
    assert foreseen.sum() > 2 * seen.sum()


def test_progress_ends_with_all_requests(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    calls: list[tuple[int, int]] = []
    system = System(name="x", planner=fixed_planner(spread_plan(3, 8, 4)))
    simulate(make_scenario(), system, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (60, 60)
    assert calls == sorted(calls)


def test_a_plan_serves_only_once_its_weights_are_there(
    make_scenario: MakeScenario, spread_plan: MakePlan, fixed_planner: Any
) -> None:
    # Cold starts of steps go before those of the plan to come, on the same link: it is ready later than was expected.
    # The rollout refuses a plan whose instances are not warm.
    scenario = make_scenario(
        arrivals=made_up_arrivals(rate_per_s=20, num_requests=40, prompt_tokens=1, output_tokens=20)
    )
    scenario = replace(scenario, cluster=replace(scenario.cluster, fetch_bytes_per_s=1e7))
    has_LEW, shares_LEW = spread_plan(3, 8, 4).dense()
    has_LEW[:, [0, 2, 4]] = False
    planner = fixed_planner(empty_plan(), Plan.from_dense(has_LEW, shares_LEW, version=2))
    result = simulate(scenario, System(name="x", planner=planner, interval_s=0.1))
    assert result.num_cold_starts > 0
    assert result.num_plans == 1
