from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_predictors.popularity import HALF_LIFE_TOKENS, OnlinePopularity, PopularityPredictor
from tests.unit.predictors.support import Routing, random_routing, routings


def test_every_token_is_expected_to_go_where_tokens_went() -> None:
    y_nE = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    predictor = PopularityPredictor(half_life_tokens=None).fit(np.zeros((4, 2)), y_nE)
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
    assert PopularityPredictor(half_life_tokens=None).fit(X_n1, y_nE).predict_topk(X_n1[:1]).tolist() == [[0]]


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
    undecayed = PopularityPredictor(half_life_tokens=None)
    shuffled = undecayed.fit(routing.X_nS[order_n], routing.y_nE[order_n]).counts_.tolist()
    assert shuffled == undecayed.fit(routing.X_nS, routing.y_nE).counts_.tolist()


def test_fit_forgets_and_partial_fit_does_not() -> None:
    X_n1, first_nE, second_nE = np.zeros((2, 1)), np.array([[1, 0], [1, 0]]), np.array([[0, 1], [0, 1]])
    predictor = PopularityPredictor(half_life_tokens=None)
    assert predictor.fit(X_n1, first_nE).fit(X_n1, second_nE).counts_.tolist() == [0, 2]
    assert predictor.fit(X_n1, first_nE).partial_fit(X_n1, second_nE).counts_.tolist() == [2, 2]


@pytest.mark.parametrize("half_life", [0, -1, float("nan")])
def test_a_half_life_must_be_positive(half_life: float) -> None:
    with pytest.raises(ValueError, match=f"half_life_tokens must be > 0 or None, got {half_life}"):
        PopularityPredictor(half_life_tokens=half_life).fit(np.zeros((1, 1)), np.ones((1, 2)))


def test_it_decays_by_default() -> None:
    X_n1 = np.zeros((2000, 1))
    y_nE = np.repeat(np.eye(2), 1000, axis=0)
    left = 2 ** (-1000 / HALF_LIFE_TOKENS)
    first = PopularityPredictor().fit(X_n1, y_nE).predict_proba(X_n1[:1])[0, 0]
    assert first == pytest.approx(left / (1 + left), rel=1e-3)


@pytest.mark.parametrize("half_life", [None, 64.0, HALF_LIFE_TOKENS])
def test_of_a_recording_all_tokens_count_alike_and_what_comes_replaces_them_at_the_half_life(
    half_life: float | None,
) -> None:
    y_nE = np.repeat(np.eye(4)[:3], [6000, 3000, 1000], axis=0)
    X_n1 = np.zeros((len(y_nE), 1))
    predictor = PopularityPredictor(half_life_tokens=half_life).fit_recording(X_n1, y_nE)
    np.testing.assert_allclose(predictor.predict_proba(X_n1[:1])[0], [0.6, 0.3, 0.1, 0], atol=1e-9)
    assert predictor.half_life_tokens == half_life
    online = OnlinePopularity(predictor)
    if half_life is not None:
        for _ in range(round(half_life)):
            online.learn(np.eye(4)[3], 1)
        np.testing.assert_allclose(online.load(10), [3, 1.5, 0.5, 5], rtol=1e-6)


def test_online_loads_are_expected_before_they_are_learned_from() -> None:
    fitted = PopularityPredictor(half_life_tokens=1.0).fit_recording(np.zeros((50, 1)), np.tile([1.0, 0.0], (50, 1)))
    online = OnlinePopularity(fitted)
    load_BE = np.tile([0.0, 20.0], (3, 1))
    expected_BE = online.loads(load_BE, [20, 20, 20])
    assert expected_BE[0].tolist() == [20, 0]
    np.testing.assert_allclose(expected_BE[1:], [[0, 20], [0, 20]], atol=1e-4)
    assert fitted.predict_topk(np.zeros((1, 1))).tolist() == [[0]]


def test_online_recall_rises_once_the_subject_was_seen() -> None:
    fitted = PopularityPredictor().fit_recording(np.zeros((5000, 1)), np.tile([1.0, 0.0], (5000, 1)))
    other_nE = np.tile([0.0, 1.0], (1000, 1))
    assert fitted.score(np.zeros((1000, 1)), other_nE) == 0
    # After 300 tokens, more than a half-life, the new expert has the greater weight.
    assert OnlinePopularity(fitted).recall(other_nE, batch_tokens=100) == pytest.approx(0.7)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -1.0])
def test_a_load_that_is_no_load_is_refused_with_its_place(fault: float) -> None:
    fitted = PopularityPredictor().fit(np.zeros((4, 1)), np.eye(4))
    load_BE = np.ones((3, 4))
    load_BE[2, 1] = fault
    with pytest.raises(ValueError, match=f"load_BE must hold loads that are finite and >= 0, got {fault} at batch 2, "):
        OnlinePopularity(fitted).loads(load_BE, [4, 4, 4])
