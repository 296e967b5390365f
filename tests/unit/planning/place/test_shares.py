from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import BoolArray, FloatArray
from moeless.core.plan import Plan
from moeless.planning.place import equal_shares, exact_shares, min_max_shares
from moeless.planning.place.shares import busiest_L, ideal_L


def plan_of(has_LEW: BoolArray) -> Plan:
    """Equal shares."""
    return Plan.from_dense(has_LEW, has_LEW / np.maximum(has_LEW.sum(axis=2, keepdims=True), 1), version=1)


def hosts(num_workers: int, *layers: list[list[int]]) -> Plan:
    """Draw each layer's workers of each expert."""
    has_LEW = np.zeros((len(layers), len(layers[0]), num_workers), dtype=np.bool_)
    for layer, experts in enumerate(layers):
        for expert, workers in enumerate(experts):
            has_LEW[layer, expert, workers] = True
    return plan_of(has_LEW)


def min_max(plan: Plan, load_LE: FloatArray, speed_W: FloatArray, *, start_N: FloatArray | None = None) -> FloatArray:
    return min_max_shares(plan.layer_N, plan.expert_N, plan.worker_N, load_LE, speed_W, start_N=start_N)


def busiest(plan: Plan, share_N: FloatArray, load_LE: FloatArray, speed_W: FloatArray) -> FloatArray:
    layer_worker_N = plan.layer_N * plan.num_workers + plan.worker_N
    tokens_N = load_LE[plan.layer_N, plan.expert_N] * share_N
    load_S = np.bincount(layer_worker_N, weights=tokens_N, minlength=plan.num_layers * plan.num_workers)
    return busiest_L(load_S.reshape(plan.num_layers, -1), speed_W)


def min_busiest(plan: Plan, load_LE: FloatArray, speed_W: FloatArray) -> FloatArray:
    """Lower bound of all shares: of every set of workers, what only they host over their speeds. By the theorem of
    max-flow and min-cut the highest of these is reached."""
    has_LEW, _ = plan.dense()
    min_L = np.zeros(plan.num_layers)
    for size in range(1, plan.num_workers + 1):
        for workers in combinations(range(plan.num_workers), size):
            elsewhere_LE = np.delete(has_LEW, workers, axis=2).any(axis=2)
            bound_L = (load_LE * ~elsewhere_LE).sum(axis=1) / speed_W[list(workers)].sum()
            min_L = np.maximum(min_L, bound_L)
    return min_L


@st.composite
def problems(draw: st.DrawFn, *, num_workers: int | None = None) -> tuple[Plan, FloatArray, FloatArray]:
    """Every function somewhere, on any number of workers that differ in speed; loads from none to many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    num_workers = num_workers or draw(st.integers(1, 4))
    has_LEW = rng.random((*shape, num_workers)) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    has_LEW |= np.arange(num_workers) == rng.integers(num_workers, size=(*shape, 1))
    load_LE = rng.lognormal(0.0, draw(st.sampled_from([0.1, 2.0])), shape) * (rng.random(shape) < 0.8)
    return plan_of(has_LEW), load_LE, rng.choice([0.5, 1.0, 1.0, 2.0], num_workers)


def test_instances_of_one_function_get_equal_shares_whatever_its_number() -> None:
    assert equal_shares(np.array([7, -3, 7, 9, 7, 9])).tolist() == [1 / 3, 1.0, 1 / 3, 0.5, 1 / 3, 0.5]
    assert equal_shares(np.array([], dtype=np.int64)).tolist() == []


def test_a_function_is_split_so_that_its_workers_are_equally_busy() -> None:
    plan = hosts(2, [[0], [0, 1]])
    assert min_max(plan, np.array([[6.0, 10.0]]), np.ones(2)).tolist() == pytest.approx([1.0, 0.2, 0.8])


def test_a_worker_that_is_busier_than_the_others_will_be_gets_nothing() -> None:
    plan = hosts(3, [[0], [2], [0, 1, 2]])
    shares = min_max(plan, np.array([[9.0, 2.0, 6.0]]), np.ones(3))
    assert shares.tolist() == pytest.approx([1.0, 1.0, 0.0, 4 / 6, 2 / 6])


def test_a_fast_worker_gets_as_much_more() -> None:
    plan = hosts(2, [[0, 1]])
    assert min_max(plan, np.array([[8.0]]), np.array([3.0, 1.0])).tolist() == pytest.approx([0.75, 0.25])


def test_functions_that_share_workers_are_split_together() -> None:
    # What the second function leaves on the middle worker depends on the third, and the other way round.
    plan, load_LE = hosts(3, [[0], [0, 1], [1, 2]]), np.array([[3.0, 9.0, 9.0]])
    shares = min_max(plan, load_LE, np.ones(3))
    assert busiest(plan, shares, load_LE, np.ones(3)).tolist() == pytest.approx([7.0], rel=0.01)


def test_functions_without_load_are_split_equally() -> None:
    plan = hosts(2, [[0, 1], [0]])
    assert min_max(plan, np.array([[0.0, 5.0]]), np.ones(2)).tolist() == [0.5, 0.5, 1.0]


def test_layers_are_split_each_for_itself() -> None:
    plan = hosts(2, [[0], [0, 1]], [[1], [0, 1]])
    load_LE = np.array([[6.0, 10.0], [2.0, 2.0]])
    assert min_max(plan, load_LE, np.ones(2)).tolist() == pytest.approx([1.0, 0.2, 0.8, 1.0, 1.0, 0.0])


def test_optimal_shares_stay() -> None:
    plan = hosts(2, [[0, 1], [0, 1]])
    start_N = np.array([1.0, 0.0, 0.0, 1.0])
    assert min_max(plan, np.array([[4.0, 4.0]]), np.ones(2), start_N=start_N).tolist() == start_N.tolist()


def test_what_is_given_to_start_from_is_not_changed() -> None:
    plan = hosts(2, [[0], [0, 1]])
    start_N = np.array([1.0, 0.5, 0.5])
    min_max(plan, np.array([[6.0, 10.0]]), np.ones(2), start_N=start_N)
    assert start_N.tolist() == [1.0, 0.5, 0.5]


def test_a_plan_without_instances_has_no_shares() -> None:
    plan = plan_of(np.zeros((2, 3, 2), dtype=np.bool_))
    assert min_max(plan, np.ones((2, 3)), np.ones(2)).shape == (0,)
    assert exact_shares(plan, np.ones((2, 3)), np.ones(2)).shape == (0,)


def test_a_layers_busiest_worker_is_by_speed_and_its_ideal_is_what_all_would_need() -> None:
    load_LW, speed_W = np.array([[6.0, 4.0], [0.0, 9.0]]), np.array([3.0, 1.0])
    assert busiest_L(load_LW, speed_W).tolist() == [4.0, 9.0]
    assert ideal_L(load_LW, speed_W).tolist() == [2.5, 2.25]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_shares_have_a_less_busy_worker_than_the_exact_ones(problem: tuple[Plan, FloatArray, FloatArray]) -> None:
    plan, load_LE, speed_W = problem
    share_N = exact_shares(*problem)
    assert (share_N >= 0).all()
    np.testing.assert_allclose(busiest(plan, share_N, load_LE, speed_W), min_busiest(*problem), rtol=1e-5, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_exact_shares_sum_to_one(problem: tuple[Plan, FloatArray, FloatArray]) -> None:
    plan = problem[0]
    function_N = plan.layer_N * plan.num_experts + plan.expert_N
    np.testing.assert_allclose(np.bincount(function_N, weights=exact_shares(*problem)), 1.0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_fast_shares_are_close_to_optimal(problem: tuple[Plan, FloatArray, FloatArray]) -> None:
    # Rounds end once little changes. The worst of thousands of random layers is 2 % off; climbing from there to worse
    # ones ended at 5.6 %.
    plan, load_LE, speed_W = problem
    max_L = 1.08 * min_busiest(*problem)
    assert (busiest(plan, min_max(*problem), load_LE, speed_W) <= max_L + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(problems(num_workers=2))
def test_with_two_workers_fast_shares_are_optimal(problem: tuple[Plan, FloatArray, FloatArray]) -> None:
    plan, load_LE, speed_W = problem
    found_L = busiest(plan, min_max(*problem), load_LE, speed_W)
    np.testing.assert_allclose(found_L, min_busiest(*problem), rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_fast_shares_sum_to_one_and_no_worker_gets_busier_than_the_busiest_was(
    problem: tuple[Plan, FloatArray, FloatArray], seed: int
) -> None:
    plan, load_LE, speed_W = problem
    function_N = plan.layer_N * plan.num_experts + plan.expert_N
    start_N = np.random.default_rng(seed).uniform(0.1, 1.0, plan.num_instances)
    start_N /= np.bincount(function_N, weights=start_N)[function_N]
    share_N = min_max(*problem, start_N=start_N)
    assert (share_N >= 0).all()
    np.testing.assert_allclose(np.bincount(function_N, weights=share_N), 1.0, atol=1e-12)
    before_L = busiest(plan, start_N, load_LE, speed_W)
    assert (busiest(plan, share_N, load_LE, speed_W) <= before_L * (1 + 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1e-12, 1e-3, 1e9]))
def test_shares_do_not_depend_on_the_unit_of_load(problem: tuple[Plan, FloatArray, FloatArray], scale: float) -> None:
    plan, load_LE, speed_W = problem
    np.testing.assert_allclose(min_max(plan, load_LE * scale, speed_W), min_max(*problem), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_the_order_of_layers_and_experts_does_not_matter(
    problem: tuple[Plan, FloatArray, FloatArray], seed: int
) -> None:
    plan, load_LE, speed_W = problem
    rng = np.random.default_rng(seed)
    layers, experts = rng.permutation(plan.num_layers), rng.permutation(plan.num_experts)
    has_LEW, _ = plan.dense()
    other = plan_of(has_LEW[layers][:, experts])
    shares_LEW, others_LEW = np.zeros(has_LEW.shape), np.zeros(has_LEW.shape)
    shares_LEW[plan.layer_N, plan.expert_N, plan.worker_N] = min_max(*problem)
    others_LEW[other.layer_N, other.expert_N, other.worker_N] = min_max(other, load_LE[layers][:, experts], speed_W)
    np.testing.assert_allclose(others_LEW, shares_LEW[layers][:, experts], atol=1e-9)
