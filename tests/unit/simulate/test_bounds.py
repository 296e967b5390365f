"""The two bounds of every plan: work divided at will, and whole calls of experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.cluster import Cluster, even_cluster
from moeless.planning.cost import ExpertTime
from moeless.simulate.layer_times import balanced_load

FLAT_UP_TO_100 = ExpertTime.from_knots([(1, 1e-3), (100, 1e-3), (200, 2e-3)])
FOUR = even_cluster(4, memory_bytes=1)


def layer_s(tokens: list[int], *, whole: bool, cluster: Cluster = FOUR) -> float:
    load = balanced_load(
        np.array(tokens), cluster, FLAT_UP_TO_100, num_layers=1, top_k=1, num_tokens=9, are_calls_integral=whole
    )
    return float(load.seconds_LW.max())


def test_five_small_calls_take_four_workers_two_rounds() -> None:
    tokens = [1, 7, 30, 2, 99, 0]
    assert layer_s(tokens, whole=True) == pytest.approx(2e-3)
    assert layer_s(tokens, whole=False) == pytest.approx(5e-3 / 4)


def test_large_calls_can_be_split() -> None:
    assert layer_s([400, 0], whole=True) == layer_s([400, 0], whole=False) == pytest.approx(1e-3)


def test_a_fast_worker_makes_more_calls() -> None:
    workers = (replace(FOUR.workers[0], speed=3.0), replace(FOUR.workers[1], speed=1.0))
    assert layer_s([1] * 4, whole=True, cluster=Cluster(workers=workers)) == pytest.approx(1e-3)
    assert layer_s([1] * 5, whole=True, cluster=Cluster(workers=workers)) == pytest.approx(4e-3 / 3)


def test_a_layer_without_tokens_takes_no_time() -> None:
    assert layer_s([0, 0], whole=True) == 0


@given(tokens=st.lists(st.integers(0, 500), min_size=1, max_size=12))
def test_whole_calls_never_take_less_than_sand(tokens: list[int]) -> None:
    assert layer_s(tokens, whole=True) >= layer_s(tokens, whole=False)
