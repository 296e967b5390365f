from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import balance_L, hops_L, workers_touched_L
from moeless.planning.affinity.statistics import gather_statistics

L, E, W, K = 3, 6, 3, 2


def random_routing(rng: np.random.Generator, tokens: int = 30) -> np.ndarray:
    return np.argsort(rng.random((tokens, L, E)), axis=2)[:, :, :K]


def plan_of(worker_LE: np.ndarray) -> Plan:
    has_LEW = worker_LE[..., np.newaxis] == np.arange(W)
    return Plan.from_dense(has_LEW, has_LEW.astype(float), version=1)


@given(seed=st.integers(0, 1000))
def test_without_replicas_workers_and_hops_are_those_of_replayed_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices, worker_LE = random_routing(rng), rng.integers(W, size=(L, E))
    statistics = gather_statistics(choices, num_experts=E)
    worker_TLk = worker_LE[np.arange(L)[:, np.newaxis], choices]
    touched = [[len(set(row.tolist())) for row in worker_TLk[:, layer]] for layer in range(L)]
    hops_TLkk = worker_TLk[:, :-1, :, np.newaxis] != worker_TLk[:, 1:, np.newaxis, :]
    np.testing.assert_allclose(workers_touched_L(plan_of(worker_LE), statistics), np.mean(touched, axis=1))
    np.testing.assert_allclose(hops_L(plan_of(worker_LE), statistics), hops_TLkk.mean(axis=(0, 2, 3)), atol=1e-12)


def test_replicas_count_by_their_shares() -> None:
    statistics = gather_statistics(np.array([[[0, 1]], [[0, 1]]]), num_experts=2)
    has_LEW = np.array([[[True, True], [True, False]]])
    shares_LEW = np.array([[[0.25, 0.75], [1.0, 0.0]]])
    plan = Plan.from_dense(has_LEW, shares_LEW, version=1)
    # Three quarters of expert 0's tokens go to the second worker, as expert 1's never do.
    assert workers_touched_L(plan, statistics).tolist() == [1.75]


def test_replicas_make_hops_by_their_shares() -> None:
    statistics = gather_statistics(np.array([[[0], [0]]]), num_experts=1)
    has_LEW = np.ones((2, 1, 2), dtype=bool)
    shares_LEW = np.array([[[0.25, 0.75]], [[0.5, 0.5]]])
    assert hops_L(Plan.from_dense(has_LEW, shares_LEW, version=1), statistics).tolist() == [0.5]


def test_balance_is_the_busiest_over_the_mean_by_speed() -> None:
    plan = plan_of(np.array([[0, 1, 2, 2, 2, 2]] * L))
    load_LE = np.array([[2.0, 1, 1, 0, 0, 0], [3.0, 1, 1, 1, 0, 0], np.zeros(6)])
    assert balance_L(plan, load_LE, np.ones(3)).tolist() == [1.5, 1.5, 1.0]
    assert balance_L(plan, load_LE, np.array([2.0, 1, 1])).tolist() == [1.0, 4 / 3, 1.0]


def test_a_plan_of_another_model_or_without_a_needed_function_is_refused() -> None:
    statistics = gather_statistics(random_routing(np.random.default_rng(0)), num_experts=E)
    other = Plan.from_dense(np.ones((1, E, W), dtype=bool), np.full((1, E, W), 1 / W), version=1)
    with pytest.raises(ConfigError, match="plan must be of 3 layers of 6 experts as the routing is, got 1 of 6"):
        workers_touched_L(other, statistics)
    has_LEW = np.ones((L, E, W), dtype=bool)
    has_LEW[1, 4] = False
    with pytest.raises(ConfigError, match="got none of L01.E004"):
        hops_L(Plan.from_dense(has_LEW, has_LEW / W, version=1), statistics)
