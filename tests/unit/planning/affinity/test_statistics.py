from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.planning.affinity.statistics import gather_statistics

# Three tokens, two layers, two of four experts.
CHOICES = np.array([
    [[1, 0], [2, 3]],
    [[0, 1], [0, 2]],
    [[2, 1], [3, 2]],
])  # fmt: skip


def routing(seed: int, *, tokens: int = 40, layers: int = 3, experts: int = 6, top_k: int = 2) -> np.ndarray:
    scores = np.random.default_rng(seed).random((tokens, layers, experts)) + np.linspace(0, 0.5, experts)
    return np.argsort(-scores, axis=2)[:, :, :top_k]


def test_a_set_is_the_same_in_any_order_of_its_experts() -> None:
    statistics = gather_statistics(CHOICES, num_experts=4)
    assert statistics.sets[0].experts_Uk.tolist() == [[0, 1], [1, 2]]
    assert statistics.sets[0].weight_U.tolist() == [2 / 3, 1 / 3]
    assert statistics.sets[1].experts_Uk.tolist() == [[0, 2], [2, 3]]


def test_transitions_are_shares_of_the_pairs_of_each_token() -> None:
    transitions_EE = gather_statistics(CHOICES, num_experts=4).transitions_LEE[0]
    assert transitions_EE[0].tolist() == [1 / 12, 0, 2 / 12, 1 / 12]
    assert transitions_EE[2].tolist() == [0, 0, 1 / 12, 1 / 12]


def test_one_layer_has_no_transitions() -> None:
    assert gather_statistics(CHOICES[:, :1], num_experts=4).transitions_LEE.shape == (0, 4, 4)


@given(seed=st.integers(0, 1000))
def test_the_statistics_agree_with_counting_tokens(seed: int) -> None:
    choices = routing(seed)
    statistics = gather_statistics(choices, num_experts=6)
    hits_TLE = (choices[..., np.newaxis] == np.arange(6)).any(axis=2)
    np.testing.assert_allclose(statistics.load_LE, hits_TLE.mean(axis=0))
    for layer in range(3):
        together_EE = np.einsum("te,tf->ef", hits_TLE[:, layer].astype(float), hits_TLE[:, layer].astype(float)) / 40
        np.testing.assert_allclose(statistics.coactivation_EE(layer), together_EE)
        assert statistics.sets[layer].weight_U.sum() == pytest.approx(1)
    np.testing.assert_allclose(statistics.transitions_LEE.sum(axis=(1, 2)), 1)
    np.testing.assert_allclose(statistics.transitions_LEE.sum(axis=2) * 2, statistics.load_LE[:-1])
    np.testing.assert_allclose(statistics.transitions_LEE.sum(axis=1) * 2, statistics.load_LE[1:])


def test_the_order_of_tokens_does_not_matter() -> None:
    choices = routing(3)
    one, other = (gather_statistics(c, num_experts=6) for c in (choices, choices[::-1]))
    np.testing.assert_array_equal(one.transitions_LEE, other.transitions_LEE)
    np.testing.assert_array_equal(one.sets[2].weight_U, other.sets[2].weight_U)


def test_few_tokens_are_taken_evenly() -> None:
    choices = routing(0)
    taken = gather_statistics(choices, num_experts=6, max_tokens=10)
    every_fourth = gather_statistics(choices[::4], num_experts=6)
    assert taken.num_tokens == 10
    np.testing.assert_array_equal(taken.transitions_LEE, every_fourth.transitions_LEE)


@pytest.mark.parametrize(
    ("choices", "max_tokens", "message"),
    [
        (np.empty((0, 2, 2), dtype=int), None, "at least one each, got \\(0, 2, 2\\)"),
        (CHOICES[0], None, "must be of tokens, layers and choices"),
        (CHOICES + 2, None, "must be from 0 to 3, got 2 to 5"),
        (CHOICES - 1, None, "must be from 0 to 3, got -1 to 2"),
        (np.array([[[1, 1]]]), None, "must hold different experts"),
        (CHOICES, 0, "max_tokens must be at least 1, got 0"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices: np.ndarray, max_tokens: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gather_statistics(choices, num_experts=4, max_tokens=max_tokens)
