from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import as_routing, capped_to_sum, num_found, one_hot, top_k_of
from moeless_predictors.popularity import PopularityPredictor

scores = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(0, 1e6, width=32),
)


@given(scores_nE=scores, data=st.data())
def test_capped_rows_have_the_sum_and_nothing_above_one(scores_nE: FloatArray, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, scores_nE.shape[1]))
    capped_nE = capped_to_sum(scores_nE, total)
    assert capped_nE.min() >= 0
    assert capped_nE.max() <= 1
    np.testing.assert_allclose(capped_nE.sum(axis=1), total, rtol=1e-4)


@given(scores_nE=scores, data=st.data())
def test_capping_keeps_the_order(scores_nE: FloatArray, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, scores_nE.shape[1]))
    capped_nE = capped_to_sum(scores_nE, total)
    for scores_E, capped_E in zip(scores_nE, capped_nE, strict=True):
        assert (np.diff(capped_E[np.argsort(scores_E)]) >= -1e-6).all()


def test_what_is_cut_off_goes_to_the_others_in_proportion() -> None:
    np.testing.assert_allclose(capped_to_sum(np.array([[8.0, 1.0, 1.0]]), 2), [[1.0, 0.5, 0.5]])


def test_a_row_of_zeros_is_spread_evenly() -> None:
    np.testing.assert_allclose(capped_to_sum(np.zeros((1, 4)), 2), np.full((1, 4), 0.5))


def test_scores_below_the_cap_are_only_scaled() -> None:
    np.testing.assert_allclose(capped_to_sum(np.array([[3.0, 2.0, 1.0]]), 1), [[3 / 6, 2 / 6, 1 / 6]])


@given(scores_nE=scores, data=st.data())
def test_the_top_k_are_distinct_and_no_other_scores_higher(scores_nE: FloatArray, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, scores_nE.shape[1]))
    for scores_E, top in zip(scores_nE, top_k_of(scores_nE, top_k), strict=True):
        assert len(set(top.tolist())) == top_k
        others = np.delete(scores_E, top)
        assert others.size == 0 or scores_E[top].min() >= others.max()


@given(scores_nE=scores, data=st.data())
def test_found_experts_are_those_among_the_top_k(scores_nE: FloatArray, data: st.DataObject) -> None:
    num_tokens, num_experts = scores_nE.shape
    top_k = data.draw(st.integers(1, num_experts))
    orders = st.permutations(range(num_experts))
    experts_nk = np.array([data.draw(orders)[:top_k] for _ in range(num_tokens)])
    predicted = top_k_of(scores_nE, top_k).tolist()
    found = [set(top) & set(true) for top, true in zip(predicted, experts_nk.tolist(), strict=True)]
    assert num_found(scores_nE, experts_nk) == sum(map(len, found))


def test_of_equal_scores_the_lower_index_comes_first() -> None:
    assert top_k_of(np.array([[1.0, 2.0, 2.0, 1.0]]), 3).tolist() == [[1, 2, 0]]


def test_choices_become_ones_or_their_values() -> None:
    experts_nk = np.array([[2, 0]], dtype=np.uint8)
    assert one_hot(experts_nk, 3).tolist() == [[1, 0, 1]]
    assert one_hot(experts_nk, 3, values_nk=np.array([[0.75, 0.25]])).tolist() == [[0.25, 0, 0.75]]


def test_routing_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"y must have the shape \(3, experts\), got \(2, 4\)"):
        as_routing(np.zeros((2, 4)), num_tokens=3)


def test_negative_routing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"y must hold values >= 0, got -1.0 at token 0, expert 1"):
        as_routing(np.array([[1.0, -1.0]]), num_tokens=1)


def test_k_is_the_mean_number_of_experts_of_a_token() -> None:
    y_nE = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]])
    assert PopularityPredictor().fit(np.zeros((3, 1)), y_nE).top_k_ == 2


def test_k_beyond_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to the 2 experts, got 3"):
        PopularityPredictor(top_k=3).fit(np.zeros((1, 1)), np.ones((1, 2)))


def test_learning_on_must_bring_as_many_experts() -> None:
    predictor = PopularityPredictor().fit(np.zeros((2, 1)), np.eye(2))
    with pytest.raises(ValueError, match="y must have 2 experts as when fitted, got 3"):
        predictor.partial_fit(np.zeros((3, 1)), np.eye(3))


def test_learning_on_refuses_routing_that_is_not_finite() -> None:
    predictor = PopularityPredictor().fit(np.zeros((2, 1)), np.eye(2))
    with pytest.raises(ValueError, match="Input y contains NaN"):
        predictor.partial_fit(np.zeros((2, 1)), np.array([[1.0, np.nan], [0.0, 1.0]]))


def test_the_score_is_the_recall_of_the_top_k() -> None:
    predictor = PopularityPredictor().fit(np.zeros((3, 1)), np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]]))
    assert predictor.score(np.zeros((2, 1)), np.array([[1, 0, 0], [0, 0, 1]])) == 0.5


@pytest.mark.parametrize(("fault", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_input_that_is_not_finite_is_refused_with_its_place(fault: float, word: str) -> None:
    X_nF, y_nE = np.ones((3, 2)), np.eye(3)
    bad_X_nF, bad_y_nE = X_nF.copy(), y_nE.copy()
    bad_X_nF[1, 1] = bad_y_nE[2, 0] = fault
    predictor = PopularityPredictor(top_k=1).fit(X_nF, y_nE)
    in_X = f"Input X contains {word}.*: values must be finite, got {fault} at token 1, feature 1"
    in_y = f"Input y contains {word}.*: values must be finite, got {fault} at token 2, expert 0"
    for learn in (predictor.fit, predictor.partial_fit):
        with pytest.raises(ValueError, match=in_X):
            learn(bad_X_nF, y_nE)
        with pytest.raises(ValueError, match=in_y):
            learn(X_nF, bad_y_nE)
    with pytest.raises(ValueError, match="at token 1, feature 1"):
        predictor.predict_load(bad_X_nF)
    with pytest.raises(ValueError, match="at token 2, expert 0"):
        predictor.score(X_nF, bad_y_nE)
