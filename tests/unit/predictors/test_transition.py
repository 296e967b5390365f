from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_predictors.popularity import PopularityPredictor
from moeless_predictors.transition import TransitionPredictor
from tests.unit.predictors.support import Routing, random_routing, routings

either_way = pytest.mark.parametrize("combine", ["mean", "product"])


def test_a_source_expert_leads_where_it_led_before() -> None:
    X_nS = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    y_nE = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    predictor = TransitionPredictor(smoothing=1e-9).fit(X_nS, y_nE)
    np.testing.assert_allclose(predictor.predict_proba(np.eye(2)), [[0.75, 0.25, 0], [0, 0, 1]], atol=1e-6)


def test_the_mean_weighs_the_source_experts_by_their_amounts() -> None:
    predictor = TransitionPredictor(smoothing=1e-9).fit(np.eye(2), np.eye(2))
    np.testing.assert_allclose(predictor.predict_proba(np.array([[3.0, 1.0]])), [[0.75, 0.25]], atol=1e-6)


def test_smoothing_adds_tokens_that_go_where_all_go() -> None:
    X_nS = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    y_nE = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
    predictor = TransitionPredictor(smoothing=2).fit(X_nS, y_nE)
    np.testing.assert_allclose(predictor.predict_proba(np.array([[1.0, 0.0]])), [[(2 + 2 * 0.75) / 4, (2 * 0.25) / 4]])


def test_a_source_expert_never_seen_leads_where_all_go() -> None:
    X_nS = np.array([[1, 0], [1, 0], [1, 0]])
    y_nE = np.array([[1, 0], [1, 0], [0, 1]])
    for combine in ("mean", "product"):
        predictor = TransitionPredictor(combine=combine).fit(X_nS, y_nE)
        np.testing.assert_allclose(predictor.predict_proba(np.array([[0.0, 1.0]])), [[2 / 3, 1 / 3]], rtol=1e-6)


@either_way
def test_a_token_without_source_experts_is_predicted_by_popularity(combine: str) -> None:
    routing = random_routing(3)
    predictor = TransitionPredictor(combine=combine).fit(routing.X_nS, routing.y_nE)
    popularity = PopularityPredictor(half_life_tokens=None).fit(routing.X_nS, routing.y_nE)
    X_nS = np.array([[0.0] * 6, [1.0] * 6])
    np.testing.assert_allclose(predictor.predict_proba(X_nS)[0], popularity.predict_proba(X_nS)[0], atol=1e-5)


@either_way
def test_only_the_proportions_of_the_amounts_matter(combine: str) -> None:
    routing = random_routing(4)
    predictor = TransitionPredictor(combine=combine).fit(routing.X_nS, routing.y_nE)
    expected_nE = predictor.predict_proba(routing.X_nS)
    np.testing.assert_allclose(predictor.predict_proba(7.0 * routing.X_nS), expected_nE, rtol=1e-5)


def test_witnesses_that_agree_add_up_in_the_product_and_average_in_the_mean() -> None:
    # Each source expert makes expert 0 three times as likely as it is: 3/4 instead of 1/4.
    X_nS = np.repeat(np.eye(3), [4, 4, 16], axis=0)
    y_nE = np.eye(2)[[0, 0, 0, 1] * 2 + [1] * 16]
    token_1S = np.array([[1.0, 1.0, 0.0]])
    mean = TransitionPredictor(smoothing=1e-9).fit(X_nS, y_nE).predict_proba(token_1S)
    product = TransitionPredictor(smoothing=1e-9, combine="product").fit(X_nS, y_nE).predict_proba(token_1S)
    # To the power of 2: odds of 3 become odds of 1/4 × 3² against 3/4 × (1/3)², relative to popularity.
    assert mean[0, 0] == pytest.approx(0.75, rel=1e-6)
    assert product[0, 0] / product[0, 1] == pytest.approx((0.25 * 3**2) / (0.75 * (1 / 3) ** 2), rel=1e-6)


@pytest.mark.parametrize("combine", ["mean", "product"])
def test_it_beats_popularity_where_layers_depend_on_one_another(combine: str) -> None:
    routing = random_routing(5, num_tokens=600, num_sources=16, num_experts=16)
    train, test = slice(0, 400), slice(400, None)
    transition = TransitionPredictor(combine=combine).fit(routing.X_nS[train], routing.y_nE[train])
    popularity = PopularityPredictor(half_life_tokens=None).fit(routing.X_nS[train], routing.y_nE[train])
    X_nS, y_nE = routing.X_nS[test], routing.y_nE[test]
    assert transition.score(X_nS, y_nE) > popularity.score(X_nS, y_nE) + 0.1


@given(routing=routings(), half_life=st.none() | st.floats(0.5, 1e4), cut=st.integers(1, 39))
def test_learning_in_parts_is_learning_at_once(routing: Routing, half_life: float | None, cut: int) -> None:
    whole = TransitionPredictor(half_life_tokens=half_life, top_k=1).fit(routing.X_nS, routing.y_nE)
    parts = TransitionPredictor(half_life_tokens=half_life, top_k=1)
    for part in (slice(0, cut), slice(cut, None)):
        if len(routing.X_nS[part]):
            parts.partial_fit(routing.X_nS[part], routing.y_nE[part])
    for name in ("transitions_", "sources_", "targets_", "num_tokens_"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


@given(routing=routings(), seed=st.integers(0, 100))
def test_without_decay_the_order_of_tokens_is_nothing(routing: Routing, seed: int) -> None:
    order_n = np.random.default_rng(seed).permutation(len(routing.X_nS))
    shuffled = TransitionPredictor().fit(routing.X_nS[order_n], routing.y_nE[order_n])
    straight = TransitionPredictor().fit(routing.X_nS, routing.y_nE)
    np.testing.assert_allclose(shuffled.transitions_, straight.transitions_)
    np.testing.assert_allclose(shuffled.predict_proba(routing.X_nS), straight.predict_proba(routing.X_nS))


def test_with_decay_the_newest_transitions_win() -> None:
    X_nS = np.ones((1050, 1))
    y_nE = np.repeat(np.eye(2), [1000, 50], axis=0)
    assert TransitionPredictor(half_life_tokens=20).fit(X_nS, y_nE).predict_topk(X_nS[:1]).tolist() == [[1]]
    assert TransitionPredictor().fit(X_nS, y_nE).predict_topk(X_nS[:1]).tolist() == [[0]]


def test_negative_amounts_are_refused() -> None:
    predictor = TransitionPredictor().fit(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match="X must hold amounts >= 0 of the source experts, got -0.5"):
        predictor.predict_load(np.array([[1.0, -0.5]]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"combine": "max"}, "combine must be 'mean' or 'product', got 'max'"),
        ({"smoothing": 0}, "smoothing must be > 0, got 0"),
        ({"evidence": -1}, "evidence must be > 0, got -1"),
        ({"half_life_tokens": 0}, "half_life_tokens must be > 0 or None, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionPredictor(**parameters).fit(np.eye(2), np.eye(2))
