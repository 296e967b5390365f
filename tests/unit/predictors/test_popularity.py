from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_predictors.popularity import PopularityPredictor
from tests.unit.predictors.support import Routing, random_routing, routings


def test_every_token_is_expected_to_go_where_tokens_went() -> None:
    y_nE = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    predictor = PopularityPredictor().fit(np.zeros((4, 2)), y_nE)
    np.testing.assert_allclose(predictor.predict_proba(np.ones((2, 2))), np.tile([0.5, 0.25, 0.25], (2, 1)))
    np.testing.assert_allclose(predictor.predict_load(np.ones((8, 2))), [4, 2, 2])


def test_the_values_of_x_do_not_matter() -> None:
    routing = random_routing(0)
    predictor = PopularityPredictor().fit(routing.X_nS, routing.y_nE)
    other = PopularityPredictor().fit(1e3 - routing.X_nS, routing.y_nE)
    assert predictor.predict_proba(routing.X_nS).tolist() == other.predict_proba(-routing.X_nS).tolist()


def test_a_token_counts_half_after_its_half_life() -> None:
    y_nE = np.array([[1, 0], [0, 1], [0, 1]])
    predictor = PopularityPredictor(half_life_tokens=2).fit(np.zeros((3, 1)), y_nE)
    np.testing.assert_allclose(predictor.counts_, [0.5, 1 + np.sqrt(0.5)])


def test_with_decay_the_newest_tokens_win() -> None:
    old_nE, new_nE = np.tile([1.0, 0.0], (1000, 1)), np.tile([0.0, 1.0], (50, 1))
    X_n1 = np.zeros((1050, 1))
    y_nE = np.concatenate([old_nE, new_nE])
    assert PopularityPredictor(half_life_tokens=20).fit(X_n1, y_nE).predict_topk(X_n1[:1]).tolist() == [[1]]
    assert PopularityPredictor().fit(X_n1, y_nE).predict_topk(X_n1[:1]).tolist() == [[0]]


@given(routing=routings(), half_life=st.none() | st.floats(0.5, 1e4), cut=st.integers(1, 39))
def test_learning_in_parts_is_learning_at_once(routing: Routing, half_life: float | None, cut: int) -> None:
    whole = PopularityPredictor(half_life_tokens=half_life, top_k=1).fit(routing.X_nS, routing.y_nE)
    parts = PopularityPredictor(half_life_tokens=half_life, top_k=1)
    for part in (slice(0, cut), slice(cut, None)):
        if len(routing.X_nS[part]):
            parts.partial_fit(routing.X_nS[part], routing.y_nE[part])
    np.testing.assert_allclose(parts.counts_, whole.counts_, rtol=1e-9, atol=1e-12)


@given(routing=routings(), seed=st.integers(0, 100))
def test_without_decay_the_order_of_tokens_is_nothing(routing: Routing, seed: int) -> None:
    order_n = np.random.default_rng(seed).permutation(len(routing.X_nS))
    shuffled = PopularityPredictor().fit(routing.X_nS[order_n], routing.y_nE[order_n])
    assert shuffled.counts_.tolist() == PopularityPredictor().fit(routing.X_nS, routing.y_nE).counts_.tolist()


def test_fit_forgets_and_partial_fit_does_not() -> None:
    X_n1, first_nE, second_nE = np.zeros((2, 1)), np.array([[1, 0], [1, 0]]), np.array([[0, 1], [0, 1]])
    assert PopularityPredictor().fit(X_n1, first_nE).fit(X_n1, second_nE).counts_.tolist() == [0, 2]
    assert PopularityPredictor().fit(X_n1, first_nE).partial_fit(X_n1, second_nE).counts_.tolist() == [2, 2]


@pytest.mark.parametrize("half_life", [0, -1, float("nan")])
def test_a_half_life_must_be_positive(half_life: float) -> None:
    with pytest.raises(ValueError, match=f"half_life_tokens must be > 0 or None, got {half_life}"):
        PopularityPredictor(half_life_tokens=half_life).fit(np.zeros((1, 1)), np.ones((1, 2)))
