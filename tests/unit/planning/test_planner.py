from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.core.policy import parse_policy, resolve
from moeless.planning.planner import MoelessPlanner, PlanningContext, hosted_instances, merged_layers
from tests.support.planners import moeless, observed, policy, system, ticks
from tests.support.planning import assert_whole, busiest_of, cluster_of, counts_of, model_of, plan_of, workers_of

# What is planned for


def test_an_instance_is_ready_after_its_bytes_and_the_time_beside() -> None:
    cluster = replace(cluster_of([1, 1]), fetch_bytes_per_s=4.0)
    planned = PlanningContext(model=model_of(1, 1, expert_bytes=8), cluster=cluster, start_s=0.5)
    assert planned.ready_s == 2.5
    assert (planned.starts_within(10.0), planned.starts_within(0.1)) == (8, 1)


def test_the_capacity_is_what_fits_each_worker() -> None:
    planned = PlanningContext(model=model_of(1, 1, expert_bytes=2), cluster=cluster_of([5, 3]))
    assert planned.capacity == 2 + 1


def test_a_layer_takes_as_long_as_its_slowest_worker() -> None:
    plan = plan_of(2, [{0: 0.5, 1: 0.5}, {1: 1.0}], [{0: 1.0}, {}])
    load_LE = np.array([[8.0, 2.0], [3.0, 5.0]])
    by_tokens = system(2, 2, cluster_of([9, 9], speeds=[1.0, 2.0]))
    assert by_tokens.layer_times_L(plan, load_LE).tolist() == [4.0, 3.0]
    # Calls of at least three tokens' time: two of them on w1.
    with_floor = replace(by_tokens, seconds=lambda tokens: np.maximum(tokens, 3.0))
    assert with_floor.layer_times_L(plan, load_LE).tolist() == [4.0, 3.0]
    assert with_floor.layer_times_L(plan, load_LE / 4).tolist() == [3.0, 3.0]


def test_replicas_work_longer_together_where_calls_do_not_get_shorter() -> None:
    load_LE, counts_LE = np.array([[8.0, 2.0, 0.0]]), np.array([[4, 1, 0]])
    by_tokens = system(1, 3, cluster_of([9, 9]))
    assert by_tokens.work_LE(load_LE, counts_LE).tolist() == [[8.0, 2.0, 0.0]]
    with_floor = replace(by_tokens, seconds=lambda tokens: np.where(tokens > 0, np.maximum(tokens, 3.0), 0.0))
    assert with_floor.work_LE(load_LE, counts_LE).tolist() == [[12.0, 3.0, 0.0]]


def test_what_takes_no_longer_than_its_weights_is_computed_whole_by_one_replica() -> None:
    load_LE, counts_LE = np.array([[2.0, 6.0, 15.0]]), np.array([[4, 4, 4]])
    planned = replace(
        system(1, 3, cluster_of([9, 9])), seconds=lambda tokens: np.maximum(tokens, 3.0), floor_tokens=3.0
    )
    # One call of 3, two of 3, four of 3.75.
    assert planned.work_LE(load_LE, counts_LE).tolist() == [[3.0, 6.0, 15.0]]
    plan = plan_of(2, [{0: 0.5, 1: 0.5}, {0: 1.0}])
    assert planned.layer_times_L(plan, np.array([[2.0, 2.0]])).tolist() == [4.5]


def test_an_instance_that_is_only_kept_warm_computes_no_part() -> None:
    planned = replace(system(1, 1, cluster_of([9, 9])), seconds=lambda tokens: 1.0 + tokens, floor_tokens=2.0)
    alone, beside, shared = (plan_of(2, [shares]) for shares in ({0: 1.0}, {0: 1.0, 1: 0.0}, {0: 0.5, 1: 0.5}))
    load_LE = np.array([[8.0]])
    assert planned.layer_times_L(alone, load_LE).tolist() == [9.0]
    assert planned.layer_times_L(beside, load_LE).tolist() == [9.0]
    assert planned.layer_times_L(shared, load_LE).tolist() == [5.0]  # two calls of four tokens


# What is hosted


def test_what_is_being_loaded_counts_and_gets_no_tokens_beside_others() -> None:
    previous = plan_of(3, [{0: 0.25, 1: 0.75}, {}], version=4)
    # Expert 0 on w2, and expert 1, that nobody has, on w0 and w2.
    hosted = hosted_instances(previous, np.array([2, 3, 5]), (1, 2, 3))
    assert hosted is not None
    assert workers_of(hosted) == {(0, 0): [0, 1, 2], (0, 1): [0, 2]}
    assert hosted.share_N.tolist() == [0.25, 0.75, 0.0, 0.5, 0.5]
    assert hosted.version == 4


def test_what_is_being_loaded_and_hosted_already_changes_nothing() -> None:
    previous = plan_of(2, [{0: 1.0}, {1: 1.0}])
    assert hosted_instances(previous, np.array([0]), (1, 2, 2)) is previous
    assert hosted_instances(previous, np.array([], dtype=np.int64), (1, 2, 2)) is previous


def test_what_is_being_loaded_at_first_is_hosted() -> None:
    hosted = hosted_instances(None, np.array([2]), (1, 2, 2))
    assert hosted is not None
    assert workers_of(hosted) == {(0, 1): [0]}
    assert hosted_instances(None, np.array([], dtype=np.int64), (1, 2, 2)) is None


def test_layers_of_two_plans_make_one() -> None:
    before = plan_of(2, [{0: 1.0}], [{0: 1.0}], [{0: 1.0}], version=1)
    after = plan_of(2, [{1: 1.0}], [{0: 0.5, 1: 0.5}], [{1: 1.0}], version=2)
    merged = merged_layers(before, after, np.array([False, True, False]))
    assert workers_of(merged) == {(0, 0): [0], (1, 0): [0, 1], (2, 0): [0]}
    assert merged.share_N.tolist() == [1.0, 0.5, 0.5, 1.0]
    assert merged.version == 2


def test_all_layers_of_one_plan_are_that_plan() -> None:
    before, after = plan_of(2, [{0: 1.0}], [{0: 1.0}]), plan_of(2, [{1: 1.0}], [{1: 1.0}])
    assert merged_layers(before, after, np.array([False, False])) is before
    assert merged_layers(before, after, np.array([True, True])) is after


# moeless's own planner: which functions have instances


def test_every_function_with_forecast_tokens_has_an_instance_and_no_other() -> None:
    planner = moeless(system(2, 3, cluster_of([9, 9])), maxReplicas=1)
    plan = planner.plan(observed([[3.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), None)
    assert counts_of(plan) == [[1, 0, 1], [0, 1, 0]]
    assert plan.version == 1


def test_tokens_at_the_forecast_quantile_alone_are_forecast_tokens() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), maxReplicas=1)
    plan = planner.plan(observed([[3.0, 0.0]], upper=[[4.0, 0.5]]), None)
    assert counts_of(plan) == [[1, 1]]


def test_a_function_is_kept_alive_and_then_goes_to_zero() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), keepAliveSeconds=3, scaleDownStabilizationSeconds=0)
    plans = ticks(planner, [[[3.0, 2.0]], *[[[3.0, 0.0]]] * 5])
    assert [counts_of(plan)[0][1] for plan in plans] == [1, 1, 1, 1, 0, 0]


def test_replicas_are_held_for_the_stabilization() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), keepAliveSeconds=0, scaleDownStabilizationSeconds=2)
    plans = ticks(planner, [[[30.0, 1.0]], *[[[1.0, 1.0]]] * 4])
    assert [counts_of(plan)[0][0] for plan in plans] == [2, 2, 1, 1, 1]


def test_a_function_that_may_not_go_to_zero_never_does() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), scaleToZero=False, keepAliveSeconds=0)
    assert counts_of(planner.plan(observed([[0.0, 0.0]]), None)) == [[1, 1]]


def test_everything_goes_to_zero_where_nothing_is_forecast() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), keepAliveSeconds=0, scaleDownStabilizationSeconds=0)
    plans = ticks(planner, [[[3.0, 3.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert [counts_of(plan) for plan in plans] == [[[1, 1]], [[0, 0]], [[0, 1]]]
    assert [plan.version for plan in plans] == [1, 2, 3]


def test_a_function_that_gets_instances_gets_its_least() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9, 9])), minReplicas=2)
    assert counts_of(planner.plan(observed([[3.0, 0.0]]), None)) == [[2, 0]]


def test_the_least_is_no_more_than_there_are_workers() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), minReplicas=5)
    assert counts_of(planner.plan(observed([[3.0, 3.0]]), None)) == [[2, 2]]


def test_without_room_in_a_layer_the_functions_with_the_least_load_go_without() -> None:
    planner = moeless(system(2, 3, cluster_of([9, 9])), layerMemoryBudget=2)
    assert counts_of(planner.plan(observed([[3.0, 1.0, 2.0], [0.0, 1.0, 0.0]]), None)) == [[1, 0, 1], [0, 1, 0]]


def test_workers_memory_is_a_budget_too() -> None:
    planner = moeless(system(2, 2, cluster_of([2, 1])))
    assert counts_of(planner.plan(observed([[3.0, 1.0], [4.0, 2.0]]), None)) == [[1, 0], [1, 1]]


# How many


@pytest.mark.parametrize(
    "scaler", [{"name": "minMax"}, {"name": "cv"}, {"name": "benefit"}], ids=lambda scaler: str(scaler["name"])
)
def test_a_hot_function_gets_replicas(scaler: dict[str, str]) -> None:
    planner = moeless(system(1, 5, cluster_of([9] * 4)), scaler=scaler, memoryBudget=6)
    load = [[40.0, 10.0, 10.0, 10.0, 10.0]]
    plan = planner.plan(observed(load), None)
    assert counts_of(plan) == [[2, 1, 1, 1, 1]]
    assert busiest_of(plan, np.array(load), np.ones(4)) == pytest.approx([20.0], rel=0.05)


def test_replicas_are_for_the_forecast_quantile() -> None:
    load = [[10.0, 10.0, 10.0, 10.0]]
    planner = moeless(system(1, 4, cluster_of([9] * 4)), memoryBudget=5, scaler={"name": "cv"})
    assert counts_of(planner.plan(observed(load, upper=[[10.0, 10.0, 30.0, 10.0]]), None)) == [[1, 1, 2, 1]]


@pytest.mark.parametrize(("most", "expected"), [(2, 2), (3, 3), (99, 4)])
def test_a_function_has_no_more_replicas_than_the_policy_allows_nor_than_workers(most: int, expected: int) -> None:
    scaler = {"name": "minMax", "maxExtraShare": 9.0}
    planner = moeless(system(1, 2, cluster_of([9] * 4)), maxReplicas=most, scaler=scaler)
    assert counts_of(planner.plan(observed([[90.0, 10.0]]), None)) == [[expected, 1]]


def test_replicas_that_would_shorten_no_call_are_not_made() -> None:
    planned = system(1, 2, cluster_of([9] * 4), floor_tokens=64.0)
    planner = moeless(planned)
    assert counts_of(planner.plan(observed([[60.0, 1.0]]), None)) == [[1, 1]]
    assert counts_of(planner.plan(observed([[600.0, 1.0]]), None)) != [[1, 1]]


def test_benefit_goes_by_the_time_of_calls() -> None:
    planned = system(1, 2, cluster_of([9] * 4), seconds=lambda tokens: np.maximum(tokens, 64.0) * (tokens > 0))
    planner = moeless(planned, scaler={"name": "benefit", "maxExtraShare": 1.0})
    assert counts_of(planner.plan(observed([[60.0, 1.0]]), None)) == [[1, 1]]
    assert counts_of(planner.plan(observed([[600.0, 1.0]]), None)) != [[1, 1]]


def test_what_is_wanted_only_for_a_while_is_not_started() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9])), scaleUpStabilizationSeconds=2)
    calm, hot = [[5.0, 5.0]], [[50.0, 5.0]]
    plans = ticks(planner, [calm, hot, calm, hot, hot, hot])
    assert [counts_of(plan)[0][0] for plan in plans] == [1, 1, 1, 1, 2, 2]


def test_alternating_loads_make_counts_rise_and_never_fall() -> None:
    planner = moeless(system(1, 4, cluster_of([9] * 4)))
    one, other = [[60.0, 10.0, 10.0, 10.0]], [[10.0, 10.0, 10.0, 60.0]]
    plans = ticks(planner, [one, other] * 10)
    assert counts_of(plans[0]) != counts_of(plans[1])
    assert all(counts_of(plan) == counts_of(plans[1]) for plan in plans[1:])


# What changes


def test_a_plan_stays_where_nothing_changes() -> None:
    planner = moeless(system(2, 3, cluster_of([9, 9])))
    plans = ticks(planner, [[[30.0, 2.0, 7.0], [4.0, 5.0, 6.0]]] * 6)
    assert plans[-1] is plans[-2]


def test_asked_again_about_the_same_moment_what_was_decided_stands() -> None:
    planner = moeless(system(1, 4, cluster_of([9, 9])), maxMovesPerTick=1, maxReplicas=1)
    before = plan_of(2, [{0: 1.0}] * 4)
    observation = observed([[5.0, 5.0, 5.0, 5.0]])
    plan = planner.plan(observation, before)
    assert len(plan.started_since(before)) == 1
    assert planner.plan(observation, plan) is plan
    assert len(planner.plan(observed([[5.0, 5.0, 5.0, 5.0]], time_s=1.0), plan).started_since(plan)) == 1


def test_what_is_being_loaded_is_not_started_again() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9, 9])), maxReplicas=1)
    before = plan_of(3, [{0: 1.0}, {}], version=3)
    plan = planner.plan(observed([[5.0, 4.0]], pending=[1 * 3 + 2]), before)
    assert workers_of(plan) == {(0, 0): [0], (0, 1): [2]}
    assert plan.version == 4


def test_nothing_is_hosted_but_what_is_being_loaded() -> None:
    planner = moeless(system(1, 2, cluster_of([9, 9, 9])), maxReplicas=1)
    plan = planner.plan(observed([[5.0, 4.0]], pending=[2]), None)
    assert workers_of(plan)[0, 0] == [2]
    assert plan.version == 1


def test_instances_move_off_a_busy_worker() -> None:
    planner = moeless(system(1, 3, cluster_of([9, 9])), maxReplicas=1)
    plan = planner.plan(observed([[6.0, 4.0, 2.0]]), plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}]))
    assert busiest_of(plan, np.array([[6.0, 4.0, 2.0]]), np.ones(2)) == [6.0]


@pytest.mark.parametrize(("threshold", "stays"), [(0.45, True), (0.35, False)])
def test_a_layer_stays_where_its_slowest_worker_would_gain_less_than_the_threshold(
    threshold: float, stays: bool
) -> None:
    # Of ten tokens on the busiest worker four can go: 40 %.
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}])
    planner = moeless(system(1, 3, cluster_of([9, 9])), maxReplicas=1, benefitThreshold=threshold)
    assert (planner.plan(observed([[6.0, 4.0, 2.0]]), before) is before) == stays


@pytest.mark.parametrize(("threshold", "stays"), [(0.3, True), (0.2, False)])
def test_replicas_wait_where_a_layer_would_gain_less_than_the_threshold(threshold: float, stays: bool) -> None:
    # Split evenly the worker with eight of twelve tokens gets six: 25 % less.
    before = plan_of(2, [{0: 1.0}, {1: 1.0}])
    planner = moeless(system(1, 2, cluster_of([9, 9])), benefitThreshold=threshold)
    assert (planner.plan(observed([[8.0, 4.0]]), before) is before) == stays


def test_warm_instances_stay_where_the_placer_moves_none() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}])
    planner = moeless(system(1, 3, cluster_of([9, 9])), maxReplicas=1, placer={"name": "localityFirst"})
    assert planner.plan(observed([[6.0, 4.0, 2.0]]), before) is before


@pytest.mark.parametrize(("max_imbalance", "stays"), [(1.7, True), (1.6, False)])
def test_a_layer_that_is_good_enough_for_the_placer_stays(max_imbalance: float, stays: bool) -> None:
    # The busiest has 10 of 12 tokens: 1.67 times its half.
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}])
    placer = {"name": "minimalMoves", "maxImbalance": max_imbalance}
    planner = moeless(system(1, 3, cluster_of([9, 9])), maxReplicas=1, placer=placer)
    assert (planner.plan(observed([[6.0, 4.0, 2.0]]), before) is before) == stays


def test_a_tick_starts_no_more_replicas_than_allowed_and_the_next_ticks_the_others() -> None:
    planner = moeless(system(1, 4, cluster_of([9] * 4)), maxMovesPerTick=1, scaler={"name": "cv"}, cvTarget=0)
    plans = ticks(planner, [[[10.0] * 4], *[[[40.0, 10.0, 10.0, 10.0]]] * 4])
    assert [counts_of(plan)[0][0] for plan in plans] == [1, 2, 3, 4, 4]
    assert all(len(after.started_since(before)) <= 1 for before, after in pairwise(plans))


def test_replicas_and_moves_of_a_tick_are_counted_together() -> None:
    # The first layer wants a replica, in the second three of four instances are in the wrong place.
    before = plan_of(4, [{0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}], [{0: 1.0}] * 4)
    planner = moeless(system(2, 4, cluster_of([9] * 4)), maxMovesPerTick=2, scaler={"name": "cv"})
    plan = planner.plan(observed([[20.0, 10.0, 10.0, 10.0], [5.0, 5.0, 5.0, 5.0]]), before)
    assert counts_of(plan) == [[2, 1, 1, 1], [1, 1, 1, 1]]
    assert plan.layer_N[plan.started_since(before)].tolist() == [0, 1]


@pytest.mark.parametrize(("moves", "replicas"), [(1, 1), (2, 2)])
def test_making_room_for_a_replica_is_counted_as_the_move_that_it_is(moves: int, replicas: int) -> None:
    # Expert 0 wants a second instance. There is memory beside its first only, so that another has to go there.
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}])
    planner = moeless(system(1, 4, cluster_of([3, 2])), maxMovesPerTick=moves, scaler={"name": "cv"})
    plan = planner.plan(observed([[100.0, 1.0, 1.0, 1.0]]), before)
    assert counts_of(plan)[0][0] == replicas
    assert len(plan.started_since(before)) <= moves


def test_where_two_replicas_need_room_and_one_is_allowed_one_is_made_each_tick() -> None:
    cluster = cluster_of([6, 4])
    before = plan_of(2, *[[{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}]] * 2)
    planner = moeless(system(2, 4, cluster), maxMovesPerTick=2, scaler={"name": "cv"})
    plan = planner.plan(observed([[100.0, 1.0, 1.0, 1.0], [90.0, 1.0, 1.0, 1.0]]), before)
    assert [counts[0] for counts in counts_of(plan)] == [2, 1]
    assert len(plan.started_since(before)) == 2


def test_where_no_room_can_be_made_instances_still_move() -> None:
    # The first layer's replica takes two moves. In the second all four are on w1.
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}], [{1: 1.0}] * 4)
    planner = moeless(system(2, 4, cluster_of([4, 6])), maxMovesPerTick=1, scaler={"name": "cv"})
    plan = planner.plan(observed([[100.0, 1.0, 1.0, 1.0], [50.0, 50.0, 50.0, 50.0]]), before)
    assert plan.layer_N[plan.started_since(before)].tolist() == [1]


def test_by_default_a_tick_moves_what_the_links_load_in_a_quarter_of_it() -> None:
    # Two workers that load an instance in a second: two instances in a second of a tick of four.
    slow = replace(cluster_of([20, 20]), local_bytes_per_s=1.0, remote_bytes_per_s=1.0, fetch_bytes_per_s=1.0)
    planned = system(1, 12, slow, horizon_steps=1e9)
    planner = MoelessPlanner(policy(planned.model, tick_s=4.0, maxReplicas=1), planned)
    before = plan_of(2, [{0: 1.0}] * 12)
    assert len(planner.plan(observed([[5.0] * 12]), before).started_since(before)) == 2


def test_what_functions_must_have_is_not_counted_as_moves() -> None:
    planner = moeless(system(1, 4, cluster_of([9, 9])), maxMovesPerTick=0)
    plan = planner.plan(observed([[5.0, 4.0, 3.0, 2.0]]), plan_of(2, [{0: 1.0}, {}, {}, {}]))
    assert counts_of(plan) == [[1, 1, 1, 1]]


def test_a_layer_makes_room_for_what_another_must_have() -> None:
    # The second layer's function must have a second instance, for which there is only w0, where the first layer's is.
    planned = system(2, 1, cluster_of([1, 2]))
    rule = {"layers": "1", "minReplicas": 2}
    planner = MoelessPlanner(resolve(parse_policy({"rules": [rule]}), planned.model), planned)
    plan = planner.plan(observed([[1.0], [1.0]]), plan_of(2, [{0: 1.0}], [{1: 1.0}]))
    assert workers_of(plan) == {(0, 0): [1], (1, 0): [0, 1]}


def test_a_policy_of_another_model_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="policy must be resolved for the model of 1 layers x 2 experts, got one for \\(1, 3\\)"
    ):
        MoelessPlanner(policy(model_of(1, 3)), system(1, 2, cluster_of([9])))


def test_workers_of_different_memory_are_planned_for_as_far_as_a_function_can_be_on_each_once() -> None:
    planned = system(1, 4, cluster_of([1, 9]))
    plan = moeless(planned).plan(observed([[9, 8, 1, 1]]), None)
    assert plan.counts_LE.tolist() == [[2, 1, 1, 1]]
    min_twice = moeless(planned, minReplicas=2).plan(observed([[9, 8, 1, 1]]), None)
    assert_whole(min_twice, planned.cluster, planned.model)
