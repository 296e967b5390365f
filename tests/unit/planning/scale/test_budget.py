from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from moeless.core.cluster import ModelShape
from moeless.core.policy import UNLIMITED, ResolvedPolicy, parse_policy, resolve
from moeless.planning.observation import Observation
from moeless.planning.scale import Limits, fit_budgets, fit_workers, min_replicas
from tests.support.planning import fits


def policy(num_layers: int, num_experts: int, **defaults: Any) -> ResolvedPolicy:
    model = ModelShape(num_layers=num_layers, num_experts=num_experts, top_k=1, expert_bytes=1, hidden_bytes=1)
    return resolve(parse_policy({"defaults": defaults}), model)


def observed(load: list[list[float]], *, idle_s: list[list[float]] | None = None) -> Observation:
    load_LE = np.array(load)
    idle_s_LE = np.full(load_LE.shape, np.inf) if idle_s is None else np.array(idle_s)
    return Observation(
        time_s=100.0,
        mean_LE=load_LE,
        upper_LE=load_LE,
        window_LE=load_LE,
        last_used_s_LE=100.0 - idle_s_LE,
        num_steps=1,
    )


def least(
    observation: Observation, policy: ResolvedPolicy, hosted: list[list[int]], *, budget: int = UNLIMITED
) -> list[list[int]]:
    counts: list[list[int]] = min_replicas(
        observation,
        policy,
        hosted_LE=np.array(hosted),
        max_LE=np.full(observation.mean_LE.shape, 8),
        budget=budget,
    ).tolist()
    return counts


def test_what_is_forecast_is_needed_and_the_rest_is_not() -> None:
    assert least(observed([[3.0, 0.0]]), policy(1, 2), [[1, 1]]) == [[1, 0]]


def test_what_the_policy_keeps_from_zero_is_needed() -> None:
    assert least(observed([[3.0, 0.0]]), policy(1, 2, scaleToZero=False, minReplicas=2), [[0, 0]]) == [[2, 2]]


def test_an_instance_is_kept_alive_and_none_is_started_for_that() -> None:
    rule = policy(1, 3, keepAliveSeconds=10)
    assert least(observed([[0.0, 0.0, 0.0]], idle_s=[[10.0, 10.5, 1.0]]), rule, [[1, 1, 0]]) == [[1, 0, 0]]


def test_without_room_the_least_recently_used_goes_first_and_then_the_least_load() -> None:
    observation = observed([[3.0, 5.0, 0.0, 0.0]], idle_s=[[0.0, 0.0, 2.0, 1.0]])
    hosted = [[1, 1, 1, 1]]
    assert least(observation, policy(1, 4, layerMemoryBudget=3), hosted) == [[1, 1, 0, 1]]
    assert least(observation, policy(1, 4, layerMemoryBudget=1), hosted) == [[0, 1, 0, 0]]
    assert least(observation, policy(1, 4, layerMemoryBudget=0), hosted) == [[0, 0, 0, 0]]


def test_second_instances_go_before_anyones_first() -> None:
    rule = policy(1, 3, minReplicas=2, memoryBudget=4)
    assert least(observed([[3.0, 5.0, 1.0]]), rule, [[2, 2, 2]], budget=4) == [[1, 2, 1]]


def test_the_models_budget_is_for_all_layers() -> None:
    observation = observed([[3.0, 5.0], [4.0, 1.0]])
    assert least(observation, policy(2, 2), [[1, 1], [1, 1]], budget=3) == [[1, 1], [1, 0]]


def test_counts_within_budgets_stay() -> None:
    counts = np.array([[3, 1]])
    bounds = Limits(min_LE=np.ones((1, 2), dtype=np.int64), max_LE=counts, budget_L=np.array([4]))
    assert fit_budgets(counts, bounds, load_LE=np.array([[9.0, 1.0]]), wanted_LE=counts, budget=4) is counts


def test_what_is_only_held_goes_before_what_is_wanted() -> None:
    counts = np.array([[3, 3]])
    bounds = Limits(min_LE=np.ones((1, 2), dtype=np.int64), max_LE=counts, budget_L=np.array([4]))
    fitted = fit_budgets(counts, bounds, load_LE=np.array([[9.0, 1.0]]), wanted_LE=np.array([[1, 3]]), budget=UNLIMITED)
    assert fitted.tolist() == [[1, 3]]


@given(st.integers(0, 2**32 - 1))
def test_fitted_counts_are_within_every_budget_and_spend_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    min_LE = rng.integers(0, 2, (3, 5))
    counts_LE = min_LE + rng.integers(0, 4, (3, 5))
    budget_L = min_LE.sum(axis=1) + rng.integers(0, 12, 3)
    budget = int(min_LE.sum() + rng.integers(0, 25))
    bounds = Limits(min_LE=min_LE, max_LE=counts_LE, budget_L=budget_L)
    wanted_LE = np.minimum(counts_LE, min_LE + 1)
    fitted_LE = fit_budgets(counts_LE, bounds, load_LE=rng.random((3, 5)), wanted_LE=wanted_LE, budget=budget)
    assert (min_LE <= fitted_LE).all()
    assert (fitted_LE <= counts_LE).all()
    assert (fitted_LE.sum(axis=1) <= budget_L).all()
    assert fitted_LE.sum() == min(budget, np.minimum(budget_L, counts_LE.sum(axis=1)).sum())


@given(st.integers(0, 2**32 - 1))
def test_least_counts_are_within_every_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load_LE = rng.integers(0, 4, (3, 5)).astype(np.float64)
    layer_budget, budget = int(rng.integers(0, 8)), int(rng.integers(0, 20))
    rule = policy(3, 5, minReplicas=2, layerMemoryBudget=layer_budget)
    observation = observed(load_LE.tolist(), idle_s=rng.integers(0, 60, (3, 5)).tolist())
    counts_LE = np.array(least(observation, rule, rng.integers(0, 2, (3, 5)).tolist(), budget=budget))
    assert (counts_LE.sum(axis=1) <= layer_budget).all()
    assert counts_LE.sum() <= budget
    assert ((counts_LE == 0) | (load_LE > 0) | (observation.last_used_s_LE >= 70)).all()
    if 2 * np.count_nonzero(load_LE) <= budget and (2 * np.count_nonzero(load_LE, axis=1) <= layer_budget).all():
        assert (counts_LE[load_LE > 0] >= 1).all()


def test_a_worker_with_much_memory_hosts_a_function_once_all_the_same() -> None:
    load_LE = np.array([[9.0, 8.0, 1.0, 1.0]])
    assert fit_workers(np.array([[2, 2, 1, 1]]), load_LE, np.array([1, 9])).tolist() == [[2, 1, 1, 1]]
    assert fit_workers(np.array([[2, 2, 1, 1]]), load_LE, np.array([5, 5])).tolist() == [[2, 2, 1, 1]]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    capacity=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_left_can_be_placed_and_nothing_goes_that_could(
    counts: list[int], capacity: list[int], seed: int
) -> None:
    counts_LE, capacity_W = np.array([counts]), np.array(capacity)
    assume(counts_LE.sum() <= capacity_W.sum())
    fitted_LE = fit_workers(counts_LE, np.random.default_rng(seed).random(counts_LE.shape), capacity_W)
    assert (fitted_LE <= counts_LE).all()
    assert fits(fitted_LE, capacity_W)
    assert ((fitted_LE == 0) == (counts_LE == 0)).all()
    assert not fits(counts_LE, capacity_W) or (fitted_LE == counts_LE).all()
