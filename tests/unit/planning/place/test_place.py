from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.place import InfeasiblePlacementError, PlacementConfig, place
from tests.support.planning import (
    assert_whole,
    busiest_of,
    cluster_of,
    clusters,
    fits,
    min_busiest,
    model_of,
    plan_of,
    workers_of,
)

STILL = PlacementConfig(max_moves=0)
EAGER = PlacementConfig(max_moves=99, max_imbalance=1.0, share_tolerance=0.0, unit_s=1.0)
"""Moves whatever makes anything better."""


def placed(
    counts: list[list[int]],
    load: list[list[float]],
    cluster: Cluster,
    *,
    previous: Plan | None = None,
    config: PlacementConfig = STILL,
) -> Plan:
    counts_LE = np.array(counts)
    return place(counts_LE, np.array(load), cluster, model_of(*counts_LE.shape), previous=previous, config=config)


def with_slow_links(cluster: Cluster) -> Cluster:
    """An instance of one byte takes a second, whichever way it comes."""
    return replace(cluster, local_bytes_per_s=1.0, remote_bytes_per_s=1.0, fetch_bytes_per_s=1.0)


def random_counts(rng: np.random.Generator, model: ModelShape, cluster: Cluster, most: int) -> IntArray:
    """Counts that fit the workers."""
    counts_LE: IntArray = rng.integers(
        0, min(most, cluster.num_workers), (model.num_layers, model.num_experts), endpoint=True
    )
    while not fits(counts_LE, cluster.capacity_W(model)):
        layers, experts = np.nonzero(counts_LE)
        index = rng.integers(len(layers))
        counts_LE[layers[index], experts[index]] -= 1
    return counts_LE


def random_load(rng: np.random.Generator, model: ModelShape) -> FloatArray:
    shape = (model.num_layers, model.num_experts)
    return rng.lognormal(0.0, 1.5, shape) * (rng.random(shape) < 0.8)


Problem = tuple[IntArray, FloatArray, Cluster, ModelShape, Plan | None]


@st.composite
def problems(draw: st.DrawFn, *, is_tight: bool = False) -> Problem:
    """Draw counts and loads to place, and perhaps a plan for others, on workers of different speed and memory."""
    model = model_of(draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    whole = model.num_layers * model.num_experts
    cluster = draw(clusters(min_memory=0 if is_tight else whole, max_memory=whole))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([1, 2, 4]))
    previous = None
    if draw(st.booleans()):
        counts_LE = random_counts(rng, model, cluster, most)
        previous = place(counts_LE, random_load(rng, model), cluster, model, config=EAGER)
    return random_counts(rng, model, cluster, most), random_load(rng, model), cluster, model, previous


configs = st.builds(
    PlacementConfig,
    max_moves=st.sampled_from([0, 1, 2, 5, 99]),
    max_imbalance=st.sampled_from([1.0, 1.05, 1.5]),
    share_tolerance=st.sampled_from([0.0, 0.01, 0.5]),
    unit_s=st.sampled_from([1e-11, 1e-6, 1.0]),
)


def test_a_first_plan_has_the_first_version_and_each_later_one_the_next() -> None:
    first = placed([[1, 1]], [[5.0, 4.0]], cluster_of([2, 2]))
    second = placed([[1, 0]], [[5.0, 4.0]], cluster_of([2, 2]), previous=replace(first, version=7))
    assert (first.version, second.version) == (1, 8)


def test_what_is_there_stays_and_what_is_missing_goes_to_the_least_busy() -> None:
    before = plan_of(2, [{1: 1.0}, {1: 1.0}, {}])
    plan = placed([[1, 1, 1]], [[5.0, 4.0, 1.0]], cluster_of([3, 3]), previous=before)
    assert workers_of(plan) == {(0, 0): [1], (0, 1): [1], (0, 2): [0]}


def test_of_too_many_instances_those_with_the_smallest_shares_go() -> None:
    before = plan_of(3, [{0: 0.2, 1: 0.5, 2: 0.3}])
    assert workers_of(placed([[2]], [[9.0]], cluster_of([1, 1, 1]), previous=before)) == {(0, 0): [1, 2]}
    assert workers_of(placed([[1]], [[9.0]], cluster_of([1, 1, 1]), previous=before)) == {(0, 0): [1]}


def test_a_worker_with_less_memory_than_before_gives_up_its_lightest_instances() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {0: 1.0}])
    plan = placed([[1, 1, 1]], [[5.0, 1.0, 4.0]], cluster_of([2, 3]), previous=before)
    assert workers_of(plan) == {(0, 0): [0], (0, 1): [1], (0, 2): [0]}


def test_replicas_share_the_tokens_so_that_the_busiest_worker_is_least_busy() -> None:
    plan = placed([[1, 2]], [[9.0, 7.0]], cluster_of([2, 2]))
    assert busiest_of(plan, np.array([[9.0, 7.0]]), np.ones(2)) == pytest.approx([9.0])
    plan = placed([[1, 2]], [[6.0, 10.0]], cluster_of([2, 2]))
    assert busiest_of(plan, np.array([[6.0, 10.0]]), np.ones(2)) == pytest.approx([8.0])


def test_shares_stay_where_new_ones_hardly_relieve_the_busiest_worker() -> None:
    before = plan_of(2, [{0: 0.5, 1: 0.5}, {0: 1.0}, {1: 1.0}])
    # Perfect shares would bring the busiest from 10.4 to 10.2, by 2 %.
    counts, load, cluster = [[2, 1, 1]], [[10.0, 5.4, 5.0]], cluster_of([3, 3])
    assert placed(counts, load, cluster, previous=before, config=replace(STILL, share_tolerance=0.03)) is before
    plan = placed(counts, load, cluster, previous=before, config=replace(STILL, share_tolerance=0.01))
    assert plan.share_N.tolist() == pytest.approx([0.48, 0.52, 1.0, 1.0])


def test_functions_that_keep_their_instances_keep_their_shares_where_others_change() -> None:
    before = plan_of(2, [{0: 0.45, 1: 0.55}, {0: 1.0}, {1: 1.0}], [{0: 1.0}, {0: 1.0}, {}])
    counts, load = [[2, 1, 1], [1, 1, 1]], [[10.0, 5.4, 5.0], [1.0, 1.0, 1.0]]
    plan = placed(counts, load, cluster_of([9, 9]), previous=before, config=replace(STILL, share_tolerance=0.05))
    assert plan.share_N[plan.layer_N == 0].tolist() == [0.45, 0.55, 1.0, 1.0]


def test_a_move_is_made_only_where_it_gains_more_than_the_transfer_takes() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}])
    counts, load, cluster = [[1, 1, 1]], [[6.0, 4.0, 2.0]], with_slow_links(cluster_of([3, 3]))
    # Four tokens less on the busiest worker, in each of ten steps, for a second.
    config = PlacementConfig(max_imbalance=1.0, horizon_steps=10.0, unit_s=1 / 40)
    assert placed(counts, load, cluster, previous=before, config=replace(config, unit_s=0.99 / 40)) is before
    plan = placed(counts, load, cluster, previous=before, config=replace(config, unit_s=1.01 / 40))
    assert workers_of(plan) == {(0, 0): [0], (0, 1): [1], (0, 2): [1]}


def test_a_plan_that_is_balanced_well_enough_stays() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {1: 1.0}])
    counts, load, cluster = [[1, 1, 1]], [[6.0, 4.0, 2.0]], cluster_of([3, 3])
    # The busiest has 10 of 12 tokens: 1.67 times its half.
    assert placed(counts, load, cluster, previous=before, config=replace(EAGER, max_imbalance=1.7)) is before
    assert placed(counts, load, cluster, previous=before, config=replace(EAGER, max_imbalance=1.6)) is not before


def test_moves_go_to_the_layers_that_need_them_most() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}], [{0: 1.0}, {0: 1.0}], [{0: 1.0}, {0: 1.0}])
    plan = placed(
        [[1, 1]] * 3, [[5.0, 5.0], [9.0, 9.0], [7.0, 7.0]], cluster_of([6, 6]),
        previous=before, config=replace(EAGER, max_moves=2),
    )  # fmt: skip
    assert plan.layer_N[plan.started_since(before)].tolist() == [1, 2]


def test_moves_of_all_layers_are_counted_together() -> None:
    # Either layer is balanced by two moves.
    before = plan_of(2, [{0: 1.0}] * 4, [{0: 1.0}] * 4)
    plan = placed(
        [[1] * 4] * 2, [[5.0] * 4, [9.0] * 4], cluster_of([8, 8]), previous=before, config=replace(EAGER, max_moves=3)
    )
    assert plan.layer_N[plan.started_since(before)].tolist() == [0, 1, 1]


def test_moves_of_one_layer_leave_memory_for_no_more_than_there_is() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}], [{0: 1.0}, {0: 1.0}])
    plan = placed([[1, 1]] * 2, [[5.0, 5.0], [9.0, 9.0]], cluster_of([4, 1]), previous=before, config=EAGER)
    assert plan.layer_N[plan.started_since(before)].tolist() == [1]


def test_functions_may_have_no_instance() -> None:
    plan = placed([[0, 0], [0, 1]], [[5.0, 5.0], [9.0, 9.0]], cluster_of([4, 1]))
    assert workers_of(plan) == {(1, 1): [0]}
    assert placed([[0, 0], [0, 0]], [[5.0, 5.0], [9.0, 9.0]], cluster_of([4, 1]), previous=plan).num_instances == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_moves": -1}, "placement.max_moves must be at least 0, got -1"),
        ({"max_imbalance": 0.99}, "placement.max_imbalance must be at least 1, got 0.99"),
        ({"max_imbalance": float("nan")}, "placement.max_imbalance must be at least 1, got nan"),
        ({"share_tolerance": -0.1}, "placement.share_tolerance must be at least 0, got -0.1"),
        ({"unit_s": -1.0}, "placement.unit_s must be at least 0, got -1.0"),
        ({"horizon_steps": float("nan")}, "placement.horizon_steps must be at least 0, got nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlacementConfig(**changed)


@pytest.mark.parametrize(
    "load", [[[1.0]], [[1.0, np.nan]], [[1.0, -1.0]], [[1.0, np.inf]]], ids=["shape", "nan", "negative", "infinite"]
)
def test_loads_that_cannot_be_are_refused(load: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="work_LE must be finite"):
        placed([[1, 1]], load, cluster_of([2]))


def test_a_plan_of_other_workers_is_refused() -> None:
    before = placed([[1, 1]], [[1.0, 1.0]], cluster_of([2, 2]))
    with pytest.raises(
        ConfigError,
        match="previous must be a plan of \\(1, 2, 3\\) layers, experts and workers, got \\(1, 2, 2\\)",
    ):
        placed([[1, 1]], [[1.0, 1.0]], cluster_of([2, 2, 2]), previous=before)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InfeasiblePlacementError, match="counts_LE must sum to at most the 3 instances .* got 4"):
        placed([[2, 2]], [[1.0, 1.0]], cluster_of([1, 2]))


@settings(max_examples=150, deadline=None)
@given(problems(is_tight=True), configs)
def test_every_function_has_its_instances_within_memory_and_its_tokens_are_shared(
    problem: Problem, config: PlacementConfig
) -> None:
    counts_LE, load_LE, cluster, model, previous = problem
    plan = place(counts_LE, load_LE, cluster, model, previous=previous, config=config)
    assert_whole(plan, cluster, model)
    np.testing.assert_array_equal(plan.counts_LE, counts_LE)


@settings(max_examples=150, deadline=None)
@given(problems(), configs)
def test_no_more_instances_start_than_are_missing_and_may_move(problem: Problem, config: PlacementConfig) -> None:
    counts_LE, load_LE, cluster, model, previous = problem
    if previous is None:
        previous = place(np.zeros_like(counts_LE), load_LE, cluster, model)
    plan = place(counts_LE, load_LE, cluster, model, previous=previous, config=config)
    missing = np.maximum(counts_LE - previous.counts_LE, 0).sum()
    assert missing <= len(plan.started_since(previous)) <= missing + config.max_moves


@settings(max_examples=100, deadline=None)
@given(problems(), configs)
def test_in_every_layer_what_moves_gain_is_worth_their_transfers(problem: Problem, config: PlacementConfig) -> None:
    counts_LE, load_LE, cluster, model, previous = problem
    slow = with_slow_links(cluster)
    config = replace(config, unit_s=config.unit_s / 100, horizon_steps=1e3)
    still = place(counts_LE, load_LE, slow, model, previous=previous, config=replace(config, max_moves=0))
    plan = place(counts_LE, load_LE, slow, model, previous=previous, config=config)
    moved_L = np.bincount(plan.layer_N[plan.started_since(still)], minlength=plan.num_layers)
    before_L, after_L = (np.array(busiest_of(each, load_LE, slow.speed_W)) for each in (still, plan))
    gain_s_L = (before_L - after_L) * config.unit_s * config.horizon_steps
    assert (gain_s_L >= moved_L * (1 - 1e-9)).all()


@settings(max_examples=60, deadline=None)
@given(problems(is_tight=True), configs)
def test_the_same_arguments_give_the_same_plan(problem: Problem, config: PlacementConfig) -> None:
    counts_LE, load_LE, cluster, model, previous = problem
    one, other = (place(counts_LE, load_LE, cluster, model, previous=previous, config=config) for _ in range(2))
    np.testing.assert_array_equal(one.keys_N, other.keys_N)
    np.testing.assert_array_equal(one.share_N, other.share_N)


@settings(max_examples=60, deadline=None)
@given(problems(is_tight=True), configs)
def test_planning_again_and_again_for_the_same_load_gets_no_worse_and_comes_to_rest(
    problem: Problem, config: PlacementConfig
) -> None:
    counts_LE, load_LE, cluster, model, previous = problem
    plan = place(counts_LE, load_LE, cluster, model, previous=previous, config=config)
    for _ in range(50):
        after = place(counts_LE, load_LE, cluster, model, previous=plan, config=config)
        if after is plan:
            return
        assert after.version == plan.version + 1
        before_L, after_L = (np.array(busiest_of(each, load_LE, cluster.speed_W)) for each in (plan, after))
        assert (after_L <= before_L * (1 + 1e-9)).all()
        plan = after
    pytest.fail("still changing after 50 plans")


@settings(max_examples=60, deadline=None)
@given(problems(), configs)
def test_a_plan_within_the_tolerances_is_not_touched(problem: Problem, config: PlacementConfig) -> None:
    counts_LE, load_LE, cluster, model, _ = problem
    plan = place(counts_LE, np.ones_like(load_LE), cluster, model)
    speeds = cluster.speed_W
    load_LW = plan.worker_load_LW(load_LE)
    ideal_L = load_LW.sum(axis=1) / speeds.sum()
    imbalance = max([1.0, *((load_LW / speeds).max(axis=1) / np.where(ideal_L > 0, ideal_L, 1.0)).tolist()])
    config = replace(config, max_imbalance=imbalance * (1 + 1e-9), share_tolerance=1.0)
    assert place(counts_LE, load_LE, cluster, model, previous=plan, config=config) is plan


@settings(max_examples=80, deadline=None)
@given(problems(), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_order_of_layers_and_experts_does_not_matter(problem: Problem, is_moving: bool, seed: int) -> None:
    counts_LE, load_LE, cluster, model, _ = problem
    config = replace(EAGER, max_moves=3) if is_moving else STILL
    if is_moving:  # replicas' shares make workers equally busy: rounding would say which of them is the busiest
        counts_LE = np.minimum(counts_LE, 1)
    rng = np.random.default_rng(seed)
    layers, experts = rng.permutation(model.num_layers), rng.permutation(model.num_experts)
    _, shares_LEW = place(counts_LE, load_LE, cluster, model, config=config).dense()
    other = place(counts_LE[layers][:, experts], load_LE[layers][:, experts], cluster, model, config=config)
    np.testing.assert_allclose(other.dense()[1], shares_LEW[layers][:, experts], atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_equal_workers_are_within_grahams_bound_of_the_optimum(loads: list[int], num_workers: int) -> None:
    load_LE, cluster = np.array([loads], dtype=np.float64), cluster_of([len(loads)] * num_workers)
    plan = place(np.ones((1, len(loads)), dtype=np.int64), load_LE, cluster, model_of(1, len(loads)))
    optimum = min_busiest(load_LE[0], np.ones(num_workers))
    assert busiest_of(plan, load_LE, np.ones(num_workers))[0] <= (4 / 3 - 1 / (3 * num_workers)) * optimum + 1e-9
