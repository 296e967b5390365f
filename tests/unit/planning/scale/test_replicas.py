from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.planning.scale import Limits, replicas, replicas_by_cv, replicas_min_max

UNLIMITED = 2**31 - 1


def limits(
    load_LE: FloatArray, *, budget: int = UNLIMITED, most: int = UNLIMITED, least: IntArray | None = None
) -> Limits:
    min_LE = (load_LE > 0).astype(np.int64) if least is None else least
    return Limits(
        min_LE=min_LE,
        max_LE=np.maximum(min_LE, most),
        budget_L=np.full(len(load_LE), budget, dtype=np.int64),
    )


@st.composite
def small_layers(draw: st.DrawFn, *, distinct: bool = False) -> tuple[FloatArray, Limits]:
    """One layer of up to four experts, few instances: all counts can be tried."""
    num_experts = draw(st.integers(1, 4))
    loads = draw(st.lists(st.integers(0, 60), min_size=num_experts, max_size=num_experts, unique=distinct))
    load_LE = np.array([loads], dtype=np.float64)
    least = draw(st.lists(st.integers(0, 2), min_size=num_experts, max_size=num_experts))
    more = draw(st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts))
    min_LE = np.maximum(np.array([least]), load_LE > 0)
    return load_LE, Limits(
        min_LE=min_LE,
        max_LE=min_LE + np.array([more]),
        budget_L=min_LE.sum(axis=1) + draw(st.integers(0, 6)),
    )


def all_counts(limits: Limits) -> list[tuple[int, ...]]:
    """Of one layer, all that are within its limits."""
    ranges = [
        range(low, high + 1) for low, high in zip(limits.min_LE[0].tolist(), limits.max_LE[0].tolist(), strict=True)
    ]
    return [counts for counts in itertools.product(*ranges) if sum(counts) <= limits.budget_L[0]]


def highest(load_LE: FloatArray, counts: IntArray | tuple[int, ...]) -> float:
    return float((load_LE[0] / np.maximum(counts, 1)).max())


def test_a_long_walk_gives_each_replica_to_the_highest_load_in_every_layer() -> None:
    load_LE = np.random.default_rng(0).integers(1, 10_000, (3, 40)).astype(np.float64)
    counts_LE = replicas_min_max(load_LE, limits(load_LE, budget=2000))
    for load_E, counts_E in zip(load_LE, counts_LE, strict=True):
        one_by_one = np.ones(40, dtype=np.int64)
        while one_by_one.sum() < counts_E.sum():
            one_by_one[np.argmax(load_E / one_by_one)] += 1
        assert counts_E.tolist() == one_by_one.tolist()
        assert counts_E.sum() > 1900


def test_loads_in_another_order_in_memory_are_not_compiled_for_anew() -> None:
    load_LE = np.random.default_rng(1).integers(0, 50, (3, 8)).astype(np.float64)
    walk: Any = replicas._walk
    counts_LE = replicas_min_max(load_LE, limits(load_LE, budget=12))
    compiled_for = list(walk.signatures)
    assert (replicas_min_max(np.asfortranarray(load_LE), limits(load_LE, budget=12)) == counts_LE).all()
    assert list(walk.signatures) == compiled_for


def spread(load_E: FloatArray, counts_E: IntArray) -> float:
    is_open = load_E > 0
    each = np.repeat(load_E[is_open] / counts_E[is_open], counts_E[is_open])
    return float(each.std() / each.mean())


def one_by_one(load_E: FloatArray, limits: Limits, max_cv: float) -> list[int]:
    """The rule as it is told: a loop."""
    counts = limits.min_LE[0].copy()
    while counts.sum() < limits.budget_L[0] and load_E.any() and spread(load_E, counts) > max_cv + 1e-9:
        each = np.where(counts < limits.max_LE[0], load_E / np.maximum(counts, 1), -1.0)
        if each.max() <= 0:
            break
        counts[int(each.argmax())] += 1
    result: list[int] = counts.tolist()
    return result


def test_the_hot_expert_gets_the_extra_replica() -> None:
    load_LE = np.array([[90.0, 10.0, 10.0]])
    assert replicas_by_cv(load_LE, limits(load_LE, budget=4), max_cv_L=np.array([0.2])).tolist() == [[2, 1, 1]]
    assert replicas_min_max(load_LE, limits(load_LE, budget=4)).tolist() == [[2, 1, 1]]


def test_replicas_are_added_until_loads_vary_little() -> None:
    load_LE = np.array([[40.0, 10.0, 10.0], [10.0, 11.0, 10.0]])
    assert replicas_by_cv(load_LE, limits(load_LE), max_cv_L=np.array([0.0, 0.2])).tolist() == [[4, 1, 1], [1, 1, 1]]


def test_every_layer_has_its_own_target() -> None:
    load_LE = np.array([[40.0, 10.0, 10.0]] * 2)
    counts = replicas_by_cv(load_LE, limits(load_LE), max_cv_L=np.array([0.0, 0.4]))
    assert counts.sum(axis=1).tolist() == [6, 4]


def test_a_small_load_takes_many_replicas_of_the_others_to_be_even() -> None:
    load_LE = np.array([[1.0, 1000.0]])
    counts = replicas_by_cv(load_LE, limits(load_LE), max_cv_L=np.array([0.01]))
    assert spread(load_LE[0], counts[0]) <= 0.01
    assert counts[0, 0] == 1


def test_functions_without_load_get_nothing_beyond_their_least() -> None:
    load_LE = np.zeros((2, 3))
    none = limits(load_LE, least=np.array([[0, 1, 2]] * 2))
    assert replicas_by_cv(load_LE, none, max_cv_L=np.zeros(2)).tolist() == [[0, 1, 2]] * 2
    assert replicas_min_max(load_LE, none).tolist() == [[0, 1, 2]] * 2


def test_no_instance_is_spent_on_what_is_not_the_highest() -> None:
    load_LE = np.array([[100.0, 60.0, 60.0]])
    # The first cannot grow: relieving the others would not lower the highest load.
    bound = Limits(min_LE=np.ones((1, 3), dtype=np.int64), max_LE=np.array([[1, 9, 9]]), budget_L=np.array([10]))
    assert replicas_min_max(load_LE, bound).tolist() == [[1, 1, 1]]


def test_enough_is_enough() -> None:
    load_LE = np.array([[100.0, 60.0, 10.0]])
    assert replicas_min_max(load_LE, limits(load_LE), enough_L=np.array([50.0])).tolist() == [[2, 2, 1]]


def test_a_function_with_load_must_be_allowed_an_instance() -> None:
    load_LE = np.array([[1.0]])
    with pytest.raises(ConfigError, match=r"limits.min_LE must be at least 1 for functions with load"):
        replicas_min_max(load_LE, limits(load_LE, least=np.array([[0]])))


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits.budget_L must have room .* got 1 for the 2 of layer 0"):
        limits(np.array([[1.0, 1.0]]), budget=1)
    with pytest.raises(ConfigError, match=r"limits.min_LE must be from 0 to max_LE"):
        Limits(min_LE=np.array([[2]]), max_LE=np.array([[1]]), budget_L=np.array([9]))


@given(small_layers())
def test_no_counts_have_a_lower_highest_load(layer: tuple[FloatArray, Limits]) -> None:
    load_LE, bounds = layer
    counts_LE = replicas_min_max(load_LE, bounds)
    assert tuple(counts_LE[0].tolist()) in all_counts(bounds)
    best = min(highest(load_LE, counts) for counts in all_counts(bounds))
    assert highest(load_LE, counts_LE[0]) == best
    # And with as few instances as that takes.
    min_instances = min(sum(counts) for counts in all_counts(bounds) if highest(load_LE, counts) == best)
    assert counts_LE.sum() == min_instances


@given(small_layers(), st.floats(0, 1))
def test_the_sorted_walk_ends_where_the_loop_does(layer: tuple[FloatArray, Limits], max_cv: float) -> None:
    load_LE, bounds = layer
    counts_LE = replicas_by_cv(load_LE, bounds, max_cv_L=np.array([max_cv]))
    assert counts_LE[0].tolist() == one_by_one(load_LE[0], bounds, max_cv)


@given(small_layers(distinct=True), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(layer: tuple[FloatArray, Limits], random: object) -> None:
    load_LE, bounds = layer
    order = np.arange(load_LE.shape[1])
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    shuffled = Limits(min_LE=bounds.min_LE[:, order], max_LE=bounds.max_LE[:, order], budget_L=bounds.budget_L)
    np.testing.assert_array_equal(
        replicas_min_max(load_LE[:, order], shuffled), replicas_min_max(load_LE, bounds)[:, order]
    )


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_layers_do_not_see_each_other(seed: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    load_LE = rng.integers(0, 100, (3, 8)).astype(np.float64)
    bounds = limits(load_LE, budget=8 + extra, most=6)
    target_L = rng.uniform(0, 0.5, 3)
    together = replicas_by_cv(load_LE, bounds, max_cv_L=target_L), replicas_min_max(load_LE, bounds)
    for layer in range(3):
        one = np.array([layer])
        alone = bounds.rows(one)
        assert replicas_by_cv(load_LE[one], alone, max_cv_L=target_L[one]).tolist() == together[0][one].tolist()
        assert replicas_min_max(load_LE[one], alone).tolist() == together[1][one].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_bounds_and_budgets_are_never_broken(seed: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(0, 2, (4, 16)) * (rng.random((4, 16)) < 0.7)
    bounds = limits(load_LE, budget=16 + extra, most=12)
    for counts_LE in (
        replicas_by_cv(load_LE, bounds, max_cv_L=np.full(4, 0.05)),
        replicas_min_max(load_LE, bounds),
    ):
        assert (counts_LE >= bounds.min_LE).all()
        assert (counts_LE <= bounds.max_LE).all()
        assert (counts_LE.sum(axis=1) <= bounds.budget_L).all()
        assert (counts_LE[load_LE > 0] >= 1).all()


def test_whole_numbers_are_loads_like_others() -> None:
    load_LE = np.array([[40, 10, 0]])
    by_float = replicas_by_cv(load_LE.astype(np.float64), limits(load_LE), max_cv_L=np.array([0.1]))
    assert (
        replicas_by_cv(load_LE, limits(load_LE), max_cv_L=np.array([0.1])).tolist() == by_float.tolist() == [[4, 1, 0]]
    )
