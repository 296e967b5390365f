from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_predictors.selector import Candidate, choose

POPULARITY = Candidate(name="popularity", score=0.32, cost_us=2)
TRANSITION = Candidate(name="transition", score=0.71, cost_us=6)
HISTORY = Candidate(name="history", score=0.72, cost_us=95)

candidates = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdef"),
        score=st.floats(0, 1),
        cost_us=st.floats(0, 1e3),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda candidate: candidate.name,
)


def test_the_cheapest_within_the_tolerance_is_taken_and_the_reason_told() -> None:
    choice = choose([POPULARITY, TRANSITION, HISTORY], 0.02)
    assert choice.name == "transition"
    assert choice.reason == "transition: 0.71, within 0.02 of the best (history 0.72), 6 µs instead of 95 µs"


def test_the_best_is_taken_where_nothing_cheaper_comes_near() -> None:
    choice = choose([POPULARITY, TRANSITION, HISTORY], 0.005)
    assert choice.name == "history"
    assert choice.reason == "history: 0.72, the best, 95 µs; no cheaper one is within 0.005 (transition 0.71)"


def test_the_best_may_be_the_cheapest() -> None:
    choice = choose([TRANSITION, Candidate(name="history", score=0.7, cost_us=95)], 0.02)
    assert choice.reason == "transition: 0.71, the best, and none is cheaper, 6 µs"


def test_a_single_candidate_is_taken() -> None:
    assert choose([HISTORY], 0).reason == "history: 0.72, the only candidate, 95 µs"


def test_a_difference_equal_to_the_tolerance_is_within_it() -> None:
    near, best = Candidate(name="near", score=0.70, cost_us=1), Candidate(name="best", score=0.72, cost_us=2)
    assert choose([near, best], 0.02).name == "near"


def test_of_equal_cost_the_better_and_of_equal_both_the_first_name_is_taken() -> None:
    worse, better = Candidate(name="a", score=0.7, cost_us=5), Candidate(name="b", score=0.71, cost_us=5)
    assert choose([worse, better], 0.1).name == "b"
    twin = Candidate(name="c", score=0.71, cost_us=5)
    assert choose([twin, better], 0.1).name == "b"


@given(candidates=candidates, tolerance=st.floats(0, 1), seed=st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_is_nothing(candidates: list[Candidate], tolerance: float, seed: object) -> None:
    shuffled = sorted(candidates, key=lambda _: seed.random())
    assert choose(shuffled, tolerance) == choose(candidates, tolerance)


@given(candidates=candidates, tolerance=st.floats(0, 1))
def test_nothing_near_the_best_is_cheaper_than_the_choice(candidates: list[Candidate], tolerance: float) -> None:
    chosen = next(one for one in candidates if one.name == choose(candidates, tolerance).name)
    best = max(candidate.score for candidate in candidates)
    assert best - chosen.score <= tolerance + 1e-9
    assert all(chosen.cost_us <= one.cost_us for one in candidates if best - one.score <= tolerance)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must not be empty"):
        choose([], 0.1)


def test_two_candidates_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must have different names, got history, history"):
        choose([HISTORY, HISTORY], 0.1)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_must_not_be_negative(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        choose([HISTORY], tolerance)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"score": float("nan")}, "history: score must be finite, got nan"),
        ({"cost_us": -1.0}, "history: cost_us must be finite and >= 0, got -1"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidate(**{"name": "history", "score": 0.5, "cost_us": 1.0, **values})
