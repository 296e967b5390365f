"""Functions with a single instance, spread over the workers in equal numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.planning.place import PlacementConfig, place
from tests.support.planning import cluster_of, model_of

SPREAD = PlacementConfig(spreads_singles=True, unit_s=1.0, horizon_steps=1e9)


def test_two_light_functions_do_not_share_a_worker_where_another_has_none() -> None:
    load_LE = np.array([[90.0, 40.0, 5.0, 5.0]])
    counts_LE = np.array([[1, 1, 1, 1]])
    cluster = cluster_of([4, 4, 4, 4])
    by_load = place(counts_LE, np.array([[90.0, 90.0, 1.0, 1.0]]), cluster_of([4, 4, 4]), model_of(1, 4))
    assert sorted(np.bincount(by_load.worker_N, minlength=3).tolist()) == [1, 1, 2]
    spread = place(counts_LE, load_LE, cluster, model_of(1, 4), config=SPREAD)
    assert np.bincount(spread.worker_N, minlength=4).tolist() == [1, 1, 1, 1]


def test_those_with_replicas_go_by_load_alone() -> None:
    counts_LE = np.array([[2, 1, 1, 1]])
    plan = place(counts_LE, np.array([[90.0, 10.0, 10.0, 1.0]]), cluster_of([4, 4, 4]), model_of(1, 4), config=SPREAD)
    singles_W = np.bincount(plan.worker_N[plan.expert_N > 0], minlength=3)
    assert singles_W.tolist() == [1, 1, 1]


@settings(max_examples=100)
@given(
    loads=st.lists(st.lists(st.floats(0.1, 1000), min_size=9, max_size=9), min_size=2, max_size=4),
    counts=st.lists(st.integers(1, 3), min_size=9, max_size=9),
    num_workers=st.integers(3, 5),
)
def test_no_worker_ever_hosts_more_than_its_part_of_them(
    loads: list[list[float]], counts: list[int], num_workers: int
) -> None:
    counts_LE, cluster, plan = np.array([counts]), cluster_of([20] * num_workers), None
    is_single_E = counts_LE[0] == 1
    for load_E in loads:
        plan = place(counts_LE, np.array([load_E]), cluster, model_of(1, 9), previous=plan, config=SPREAD)
        singles_W = np.bincount(plan.worker_N[is_single_E[plan.expert_N]], minlength=num_workers)
        assert singles_W.max(initial=0) <= -(-int(is_single_E.sum()) // num_workers)
