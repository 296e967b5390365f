from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.planning.scale import Limits, replicas_by_benefit

UNLIMITED = 2**31 - 1


def limits(load_LE: FloatArray, *, budget: int = UNLIMITED, most: int = UNLIMITED) -> Limits:
    return Limits(
        min_LE=np.ones(load_LE.shape, dtype=np.int64),
        max_LE=np.full(load_LE.shape, most, dtype=np.int64),
        budget_L=np.full(len(load_LE), budget, dtype=np.int64),
    )


def total_time(load_LE: FloatArray, counts_LE: IntArray, num_workers: int, floor_s: float = 0.0) -> float:
    """As promised: the guarantee of heaviest-first placing, summed over layers."""
    call_s_LE = np.maximum(load_LE / counts_LE, floor_s)
    work_L = (counts_LE * call_s_LE).sum(axis=1)
    return float((work_L / num_workers + (1 - 1 / num_workers) * call_s_LE.max(axis=1)).sum())


def test_replicas_go_where_they_pay() -> None:
    load_LE = np.array([[90.0, 1.0, 1.0], [10.0, 9.0, 1.0]])
    counts = replicas_by_benefit(load_LE, limits(load_LE), num_extras=2, num_workers=2)
    assert counts.tolist() == [[3, 1, 1], [1, 1, 1]]


def test_two_equally_hot_experts_are_relieved_together_or_not_at_all() -> None:
    load_LE = np.array([[50.0, 50.0, 0.0], [40.0, 25.0, 0.0]])
    one = replicas_by_benefit(load_LE, limits(load_LE), num_extras=1, num_workers=4)
    two = replicas_by_benefit(load_LE, limits(load_LE), num_extras=2, num_workers=4)
    assert one.tolist() == [[1, 1, 1], [2, 1, 1]]
    assert two.tolist() == [[2, 2, 1], [1, 1, 1]]


def test_nothing_is_spent_where_time_does_not_fall() -> None:
    load_LE = np.array([[60.0, 2.0], [600.0, 2.0]])
    counts = replicas_by_benefit(
        load_LE,
        limits(load_LE),
        num_extras=3,
        num_workers=4,
        seconds=lambda tokens: np.maximum(tokens, 64.0),  # reading weights takes as long as 64 tokens
    )
    assert counts.tolist() == [[1, 1], [4, 1]]


def test_a_share_of_the_workers_load_is_relief_enough() -> None:
    load_LE = np.array([[100.0, 50.0, 50.0]])
    counts = replicas_by_benefit(load_LE, limits(load_LE), num_extras=99, num_workers=4, worker_share=1.0)
    assert counts.tolist() == [[2, 1, 1]]


def test_layers_keep_their_own_budgets() -> None:
    load_LE = np.array([[90.0, 1.0], [9.0, 1.0]])
    counts = replicas_by_benefit(load_LE, limits(load_LE, budget=3), num_extras=9, num_workers=8)
    assert counts.sum(axis=1).tolist() == [3, 3]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(0, 40),
)
def test_no_counts_take_less_time(loads: list[list[int]], num_extras: int, most: int, budget: int, floor: int) -> None:
    load_LE = np.array(loads, dtype=np.float64)
    bounds = limits(load_LE, budget=3 + budget, most=most)
    counts_LE = replicas_by_benefit(
        load_LE, bounds, num_extras=num_extras, num_workers=3, seconds=lambda tokens: np.maximum(tokens, float(floor))
    )
    assert counts_LE.sum() <= load_LE.size + num_extras
    assert (counts_LE <= bounds.max_LE).all()
    assert (counts_LE.sum(axis=1) <= bounds.budget_L).all()
    # Of each layer alone, the least time with each number of extras; then all ways to divide the extras.
    best_of = []
    for layer in range(len(loads)):
        best = [np.inf] * (num_extras + 1)
        for extras in itertools.product(range(most), repeat=3):
            if sum(extras) <= min(num_extras, budget):
                time = total_time(load_LE[[layer]], 1 + np.array([extras]), 3, floor)
                best[sum(extras)] = min(best[sum(extras)], time)
        best_of.append(best)
    least = min(
        sum(best_of[layer][size] for layer, size in enumerate(sizes))
        for sizes in itertools.product(range(num_extras + 1), repeat=len(loads))
        if sum(sizes) <= num_extras
    )
    assert np.isclose(total_time(load_LE, counts_LE, 3, floor), least)
