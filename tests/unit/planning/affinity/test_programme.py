from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.planning.affinity.groups import Solved, min_workers_by_groups, num_groups
from moeless.planning.affinity.metrics import hops, touched
from moeless.planning.affinity.programme import SolverLimits, min_hops, min_hops_beside, min_workers
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import AffinityStatistics, gather_statistics

E, W = 5, 3


def statistics_of(seed: int, *, layers: int = 1, experts: int = E, top_k: int = 2) -> AffinityStatistics:
    rng = np.random.default_rng(seed)
    scores = rng.random((30, layers, experts)) + rng.random((layers, experts))
    return gather_statistics(np.argsort(-scores, axis=2)[:, :, :top_k], num_experts=experts)


def bounds_for(
    load_E: np.ndarray, *, imbalance: float, most: int, speeds: tuple[float, ...] = (1.0,) * W
) -> LayerBounds:
    speed_W = np.array(speeds)
    return LayerBounds(
        load_E=load_E,
        max_load_W=imbalance * load_E.sum() * speed_W / speed_W.sum(),
        max_instances_W=np.full(len(speeds), most),
    )


def placements(bounds: LayerBounds) -> list[np.ndarray]:
    """All that keep to the bounds."""
    num_workers = len(bounds.max_load_W)
    found = []
    for workers in product(range(num_workers), repeat=len(bounds.load_E)):
        worker_E = np.array(workers)
        is_light = (np.bincount(worker_E, bounds.load_E, num_workers) <= bounds.max_load_W + 1e-9).all()
        if is_light and (np.bincount(worker_E, minlength=num_workers) <= bounds.max_instances_W).all():
            found.append(worker_E)
    return found


def dense(worker_E: np.ndarray, num_workers: int = W) -> np.ndarray:
    return (worker_E[:, np.newaxis] == np.arange(num_workers)).astype(float)


def check_optimal(solved: Solved, costs: list[float], bounds: LayerBounds) -> None:
    if not costs:
        assert solved.worker_n is None
        assert solved.bound == np.inf
        return
    assert solved.worker_n is not None
    assert any(np.array_equal(solved.worker_n, placed) for placed in placements(bounds))
    assert solved.cost == pytest.approx(min(costs), abs=1e-6)
    assert solved.bound == pytest.approx(min(costs), abs=1e-6)
    assert solved.gap <= 1e-6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), imbalance=st.sampled_from([1.05, 1.2, 1.5, 3.0]), most=st.integers(2, E),
    top_k=st.integers(1, 3),
)  # fmt: skip
def test_both_programmes_find_the_fewest_workers_of_all_placements(
    seed: int, imbalance: float, most: int, top_k: int
) -> None:
    statistics = statistics_of(seed, top_k=top_k)
    sets, bounds = statistics.sets[0], bounds_for(statistics.load_LE[0], imbalance=imbalance, most=most)
    costs = [touched(dense(worker_E), sets) for worker_E in placements(bounds)]
    check_optimal(min_workers_by_groups(sets, bounds), costs, bounds)
    check_optimal(min_workers(sets, bounds), costs, bounds)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), imbalance=st.sampled_from([1.1, 1.5]))
def test_workers_that_differ_are_not_taken_for_one_another(seed: int, imbalance: float) -> None:
    statistics = statistics_of(seed)
    bounds = bounds_for(statistics.load_LE[0], imbalance=imbalance, most=3, speeds=(3.0, 1.0, 2.0))
    costs = [touched(dense(worker_E), statistics.sets[0]) for worker_E in placements(bounds)]
    check_optimal(min_workers(statistics.sets[0], bounds), costs, bounds)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), excess=st.sampled_from([0.0, 0.001, 0.2]))
def test_what_is_known_already_does_not_hide_what_is_better(seed: int, excess: float) -> None:
    statistics = statistics_of(seed)
    sets, bounds = statistics.sets[0], bounds_for(statistics.load_LE[0], imbalance=1.5, most=3)
    best = min(touched(dense(worker_E), sets) for worker_E in placements(bounds))
    solved = min_workers_by_groups(sets, bounds, known_cost=best + excess)
    assert solved.bound == pytest.approx(best, abs=1e-6)
    assert excess == 0 or solved.cost == pytest.approx(best, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), max_sets=st.integers(1, 6))
def test_the_bound_from_some_of_the_sets_holds_for_all(seed: int, max_sets: int) -> None:
    statistics = statistics_of(seed)
    sets, bounds = statistics.sets[0], bounds_for(statistics.load_LE[0], imbalance=1.5, most=3)
    best = min(touched(dense(worker_E), sets) for worker_E in placements(bounds))
    solved = min_workers(sets, bounds, max_sets=max_sets)
    assert solved.worker_n is not None
    assert solved.bound <= best + 1e-6
    assert solved.cost == pytest.approx(touched(dense(solved.worker_n), sets))
    assert solved.cost >= best - 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), imbalance=st.sampled_from([1.1, 1.3, 3.0]), most=st.integers(2, E))
def test_a_layer_keeps_the_most_pairs_with_its_neighbours(seed: int, imbalance: float, most: int) -> None:
    statistics = statistics_of(seed)
    bounds = bounds_for(statistics.load_LE[0], imbalance=imbalance, most=most)
    kept_EW = np.random.default_rng(seed).random((E, W))
    costs = [-float(kept_EW[np.arange(E), worker_E].sum()) for worker_E in placements(bounds)]
    check_optimal(min_hops_beside(kept_EW, np.arange(E), np.ones(E), bounds), costs, bounds)


def test_replicas_of_a_layer_go_to_different_workers() -> None:
    bounds = LayerBounds(load_E=np.ones(2), max_load_W=np.full(2, 9.0), max_instances_W=np.full(2, 9))
    kept_EW = np.array([[1.0, 0.5], [1.0, 0.0]])
    solved = min_hops_beside(kept_EW, np.array([0, 0, 1]), np.array([0.5, 0.5, 1.0]), bounds)
    assert solved.worker_n is not None
    assert sorted(solved.worker_n[:2].tolist()) == [0, 1]
    assert solved.cost == pytest.approx(-1.75)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), imbalance=st.sampled_from([1.2, 2.0]))
def test_all_layers_at_once_hop_least_of_all_placements(seed: int, imbalance: float) -> None:
    statistics = statistics_of(seed, layers=3, experts=4)
    bounds = [bounds_for(load_E, imbalance=imbalance, most=2, speeds=(1.0, 1.0)) for load_E in statistics.load_LE]
    layers = [[dense(worker_E, 2) for worker_E in placements(layer)] for layer in bounds]
    one, other = statistics.transitions_LEE
    costs = [hops(a, b, one) + hops(b, c, other) for a, b, c in product(*layers)]
    solved = min_hops(statistics.transitions_LEE, bounds)
    if not costs:
        assert solved.worker_n is None
    else:
        assert solved.cost == pytest.approx(min(costs), abs=1e-6)
        assert solved.bound == pytest.approx(min(costs), abs=1e-6)


def test_what_is_proved_holds_when_time_runs_out() -> None:
    statistics = statistics_of(3, experts=12, top_k=3)
    bounds = bounds_for(statistics.load_LE[0], imbalance=1.2, most=5)
    best = min_workers_by_groups(statistics.sets[0], bounds)
    hurried = min_workers_by_groups(statistics.sets[0], bounds, time_limit_s=1e-6)
    assert best.gap == 0
    assert 0 < hurried.bound <= best.cost + 1e-9
    assert hurried.cost >= best.cost - 1e-9
    by_sets = min_workers(statistics.sets[0], bounds, limits=SolverLimits(time_limit_s=1e-6))
    assert by_sets.bound <= best.cost + 1e-9


def test_bounds_that_nothing_keeps_to_have_no_placement() -> None:
    statistics = statistics_of(0)
    bounds = bounds_for(statistics.load_LE[0], imbalance=0.9, most=2)
    for solved in (
        min_workers(statistics.sets[0], bounds),
        min_workers_by_groups(statistics.sets[0], bounds),
        min_hops_beside(np.ones((E, W)), np.arange(E), np.ones(E), bounds),
    ):
        assert solved.worker_n is None
        assert (solved.cost, solved.bound) == (np.inf, np.inf)


def test_groups_are_those_that_leave_room_for_all_experts() -> None:
    # Of six experts on three workers of two each, all groups have two.
    assert num_groups(6, bounds_for(np.ones(6), imbalance=1.0, most=2)) == 15
    assert num_groups(6, bounds_for(np.ones(6), imbalance=1.0, most=3)) == 6 + 15 + 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_limit_s": 0.0}, "solver.time_limit_s must be above 0, got 0.0"),
        ({"gap": -0.1}, "solver.gap must be at least 0, got -0.1"),
    ],
)
def test_limits_that_cannot_be_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolverLimits(**changed)
