from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import one_hot, top_k_of
from moeless_predictors.metrics import bound_width, coverage, recall_at_k, relative_l1, straggler_hit_rate

seeds = st.integers(0, 2**32 - 1)


def test_recall_is_the_share_of_true_experts_that_were_predicted() -> None:
    routing_nE = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert recall_at_k(np.array([[0, 2], [2, 3]]), routing_nE) == 3 / 4


def test_recall_counts_gate_weights_as_chosen() -> None:
    assert recall_at_k(np.array([[1]]), np.array([[0.0, 0.25]])) == 1.0


def test_nothing_to_find_is_found() -> None:
    assert recall_at_k(np.array([[0]]), np.zeros((1, 2))) == 1.0


@given(seed=seeds, top_k=st.integers(1, 8))
def test_a_random_guess_of_all_experts_but_some_is_right_by_their_share(seed: int, top_k: int) -> None:
    random = np.random.default_rng(seed)
    routing_nE = one_hot(top_k_of(random.random((5, 8)), top_k), 8)
    order_nE = top_k_of(random.random((5, 8)), 8)
    found = [recall_at_k(order_nE[:, :num], routing_nE) for num in range(1, 9)]
    assert found == sorted(found)
    assert found[-1] == 1.0


def test_the_load_error_is_relative_to_the_load_and_averaged_over_batches() -> None:
    load_BE = np.array([[4.0, 0.0], [1.0, 1.0]])
    assert relative_l1(np.array([[3.0, 1.0], [1.0, 1.0]]), load_BE) == pytest.approx((2 / 4 + 0) / 2)


def test_batches_without_load_do_not_count() -> None:
    assert relative_l1(np.array([[1.0, 1.0], [0.0, 2.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])) == 1.0
    assert relative_l1(np.ones((1, 2)), np.zeros((1, 2))) == 0.0


@given(seed=seeds)
def test_the_load_error_of_equal_sums_is_at_most_two(seed: int) -> None:
    random = np.random.default_rng(seed)
    load_BE = random.random((4, 6)) + 1e-3
    predicted_BE = random.random((4, 6)) + 1e-3
    predicted_BE *= load_BE.sum(axis=1, keepdims=True) / predicted_BE.sum(axis=1, keepdims=True)
    assert 0 <= relative_l1(predicted_BE, load_BE) <= 2
    assert relative_l1(load_BE, load_BE) == 0


def test_the_straggler_is_hit_if_it_is_among_the_picked() -> None:
    load_BE = np.array([[5.0, 1.0, 1.0], [1.0, 5.0, 1.0]])
    predicted_BE = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert straggler_hit_rate(predicted_BE, load_BE) == 0.5
    assert straggler_hit_rate(predicted_BE, load_BE, share=0.5) == 1.0


def test_any_of_several_stragglers_counts() -> None:
    assert straggler_hit_rate(np.array([[0.0, 1.0, 0.5]]), np.array([[3.0, 3.0, 1.0]])) == 1.0


def test_ten_percent_of_twenty_experts_are_two() -> None:
    predicted_BE = np.arange(20.0)[np.newaxis]
    for expert, hit in ((19, 1.0), (18, 1.0), (17, 0.0)):
        assert straggler_hit_rate(predicted_BE, np.eye(20)[[expert]]) == hit


def test_a_load_equal_to_its_bound_is_covered() -> None:
    assert coverage(np.array([[1.0, 2.0]]), np.array([[1.0, 3.0]])) == 0.5


@pytest.mark.parametrize("fault", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize(
    ("measure", "faulty", "name"),
    [
        (relative_l1, 0, "predicted_BE"),
        (relative_l1, 1, "load_BE"),
        (straggler_hit_rate, 0, "predicted_BE"),
        (straggler_hit_rate, 1, "load_BE"),
        (coverage, 0, "upper_BE"),
        (coverage, 1, "load_BE"),
        (bound_width, 0, "upper_BE"),
        (bound_width, 1, "load_BE"),
    ],
)
def test_what_is_no_load_is_refused_with_its_place(
    measure: Callable[[FloatArray, FloatArray], float], faulty: int, name: str, fault: float
) -> None:
    arrays = [np.ones((3, 4)), np.ones((3, 4))]
    arrays[faulty][2, 1] = fault
    with pytest.raises(ValueError, match=f"{name} must hold loads .* got {fault} at batch 2, expert 1"):
        measure(*arrays)


def test_the_width_is_the_bound_over_the_load() -> None:
    assert bound_width(np.array([[3.0, 3.0], [2.0, 2.0]]), np.array([[3.0, 0.0], [1.0, 1.0]])) == 2.0
