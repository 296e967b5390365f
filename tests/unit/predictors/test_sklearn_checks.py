"""scikit-learn's own checks and what every predictor promises, for every predictor whose input is an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from moeless_predictors.base import LoadPredictor
from moeless_predictors.gate import GatePredictor
from moeless_predictors.history import HistoryPredictor
from moeless_predictors.popularity import PopularityPredictor
from moeless_predictors.transition import TransitionPredictor
from tests.unit.predictors.support import Routing, routings

ARRAY_PREDICTORS = [
    PopularityPredictor(),
    PopularityPredictor(half_life_tokens=20),
    TransitionPredictor(),
    TransitionPredictor(half_life_tokens=20),
    TransitionPredictor(combine="product"),
    HistoryPredictor(epochs=2, min_steps=1, hidden_units=8),
    GatePredictor(num_steps=10),
]

each_predictor = pytest.mark.parametrize("predictor", ARRAY_PREDICTORS, ids=repr)


# Not checked: arrays of other libraries (SCIPY_ARRAY_API must be set before scipy is imported).
@parametrize_with_checks(ARRAY_PREDICTORS)
def test_it_is_a_scikit_learn_estimator(estimator: LoadPredictor, check: Callable[[Any], None]) -> None:
    check(estimator)


@each_predictor
@settings(deadline=None, max_examples=50)
@given(routing=routings())
def test_probabilities_are_between_zero_and_one_and_sum_to_k(predictor: LoadPredictor, routing: Routing) -> None:
    proba_nE = _fitted(predictor, routing).predict_proba(routing.X_nS)
    assert proba_nE.shape == routing.y_nE.shape
    assert proba_nE.min() >= 0
    assert proba_nE.max() <= 1
    np.testing.assert_allclose(proba_nE.sum(axis=1), routing.top_k, rtol=1e-5)


@each_predictor
@settings(deadline=None, max_examples=50)
@given(routing=routings())
def test_loads_are_never_negative_and_sum_to_tokens_times_k(predictor: LoadPredictor, routing: Routing) -> None:
    load_E = _fitted(predictor, routing).predict_load(routing.X_nS)
    assert load_E.shape == routing.y_nE.shape[1:]
    assert load_E.min() >= 0
    np.testing.assert_allclose(load_E.sum(), len(routing.y_nE) * routing.top_k, rtol=1e-5)


@each_predictor
@settings(deadline=None, max_examples=50)
@given(routing=routings())
def test_loads_are_the_sums_of_the_probabilities(predictor: LoadPredictor, routing: Routing) -> None:
    fitted = _fitted(predictor, routing)
    expected_E = fitted.predict_proba(routing.X_nS).sum(axis=0)
    np.testing.assert_allclose(fitted.predict_load(routing.X_nS), expected_E, rtol=1e-6)


@each_predictor
@settings(deadline=None, max_examples=50)
@given(routing=routings())
def test_the_top_k_are_different_experts(predictor: LoadPredictor, routing: Routing) -> None:
    experts_nk = _fitted(predictor, routing).predict_topk(routing.X_nS)
    assert experts_nk.shape == (len(routing.y_nE), routing.top_k)
    assert all(len(set(experts_k)) == routing.top_k for experts_k in experts_nk.tolist())
    assert experts_nk.min() >= 0
    assert experts_nk.max() < routing.y_nE.shape[1]


@each_predictor
@settings(deadline=None, max_examples=50)
@given(routing=routings(), seed=st.integers(0, 100))
def test_tokens_are_predicted_alike_in_any_order(predictor: LoadPredictor, routing: Routing, seed: int) -> None:
    fitted = _fitted(predictor, routing)
    order_n = np.random.default_rng(seed).permutation(len(routing.X_nS))
    proba_nE = fitted.predict_proba(routing.X_nS)
    np.testing.assert_allclose(fitted.predict_proba(routing.X_nS[order_n]), proba_nE[order_n], atol=1e-6)
    shuffled_E = fitted.predict_load(routing.X_nS[order_n])
    np.testing.assert_allclose(shuffled_E, fitted.predict_load(routing.X_nS), atol=1e-4)


@each_predictor
def test_another_number_of_features_is_refused_however_clean_the_array(predictor: LoadPredictor) -> None:
    fitted = clone(predictor).fit(np.ones((4, 3)), np.eye(4))
    with pytest.raises(ValueError, match="X has 2 features, but .* is expecting 3 features"):
        fitted.predict_load(np.ones((4, 2)))


@each_predictor
def test_a_token_that_is_not_finite_is_refused(predictor: LoadPredictor) -> None:
    fitted = clone(predictor).fit(np.ones((4, 3)), np.eye(4))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        fitted.predict_load(np.array([[1.0, np.nan, 0.0]]))


def _fitted(predictor: LoadPredictor, routing: Routing) -> LoadPredictor:
    return clone(predictor).set_params(top_k=routing.top_k).fit(routing.X_nS, routing.y_nE)
