from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moeless.core.arrays import Int64Array
from moeless.planning.baselines.lp import lp_split
from moeless.planning.step_balance import Replicas


def optimum(tokens_F: Int64Array, workers_F: list[list[int]], busy_W: Int64Array) -> float:
    """Tokens of the busiest worker, by HiGHS."""
    pairs = [(function, worker) for function, workers in enumerate(workers_F) for worker in workers]
    parts_FN = np.zeros((len(tokens_F), len(pairs) + 1))
    held_WN = np.zeros((len(busy_W), len(pairs) + 1))
    for number, (function, worker) in enumerate(pairs):
        parts_FN[function, number] = held_WN[worker, number] = 1
    held_WN[:, -1] = -1
    cost_N = np.zeros(len(pairs) + 1)
    cost_N[-1] = 1
    found = linprog(cost_N, A_ub=held_WN, b_ub=-busy_W, A_eq=parts_FN, b_eq=tokens_F, method="highs")
    assert found.success
    return float(found.fun)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Int64Array, list[list[int]], Int64Array]:
    num_workers = draw(st.integers(2, 8))
    workers_F = draw(
        st.lists(
            st.lists(st.integers(0, num_workers - 1), min_size=2, max_size=num_workers, unique=True),
            min_size=1,
            max_size=10,
        )
    )
    tokens_F = draw(st.lists(st.integers(0, 500), min_size=len(workers_F), max_size=len(workers_F)))
    busy_W = draw(st.lists(st.integers(0, 300), min_size=num_workers, max_size=num_workers))
    return np.array(tokens_F), workers_F, np.array(busy_W)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_the_busiest_worker_has_the_tokens_of_the_linear_programme(
    case: tuple[Int64Array, list[list[int]], Int64Array],
) -> None:
    tokens_F, workers_F, busy_W = case
    replicas = Replicas.of_one_layer(workers_F, [[1 / len(workers)] * len(workers) for workers in workers_F])
    after_LW = busy_W[np.newaxis].copy()
    split_N = lp_split(tokens_F, replicas, after_LW)
    assert (split_N >= 0).all()
    assert np.add.reduceat(split_N, replicas.instance_F[:-1]).tolist() == tokens_F.tolist()
    held_W = busy_W + np.bincount(replicas.worker_N, weights=split_N, minlength=len(busy_W))
    assert after_LW[0].tolist() == held_W.tolist()
    assert held_W.max() == math.ceil(optimum(tokens_F, workers_F, busy_W) - 1e-6)


def test_tokens_are_passed_along_where_only_another_function_can_give_way() -> None:
    # Function 0 can use workers 0 and 1, function 1 workers 1 and 2: worker 2 is free only for function 1.
    replicas = Replicas.of_one_layer([[0, 1], [1, 2]], [[0.5, 0.5], [0.5, 0.5]])
    busy_LW = np.array([[30, 0, 0]])
    assert lp_split(np.array([50, 40]), replicas, busy_LW).tolist() == [10, 40, 0, 40]
    assert busy_LW.tolist() == [[40, 40, 40]]


def test_each_layer_is_split_by_itself() -> None:
    replicas = Replicas(
        function_L=np.array([0, 1, 1, 2]),
        instance_F=np.array([0, 2, 4]),
        worker_N=np.array([0, 1, 0, 1]),
        share_N=np.full(4, 0.5),
    )
    busy_LW = np.array([[10, 0], [7, 7], [0, 4]])
    assert lp_split(np.array([10, 8]), replicas, busy_LW).tolist() == [0, 10, 6, 2]
    assert busy_LW.tolist() == [[10, 10], [7, 7], [6, 6]]


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_go_to_one_replica(tokens: int) -> None:
    replicas = Replicas.of_one_layer([[0, 1, 2]], [[1 / 3] * 3])
    busy_LW = np.zeros((1, 3), dtype=np.int64)
    assert sorted(lp_split(np.array([tokens]), replicas, busy_LW).tolist()) == [0, 0, tokens]
