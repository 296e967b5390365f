from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.planning.affinity.hops_bound import min_hops_bound
from moeless.planning.affinity.metrics import hops
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import gather_statistics

E, W = 5, 2


def placements(bounds: LayerBounds) -> list[np.ndarray]:
    found = []
    for workers in product(range(W), repeat=E):
        load_W = np.bincount(workers, bounds.load_E, W)
        hosted_W = np.bincount(workers, minlength=W)
        if (load_W <= bounds.max_load_W + 1e-9).all() and (hosted_W <= bounds.max_instances_W).all():
            found.append(np.array(workers))
    return found


def bounds_for(load_E: np.ndarray, *, imbalance: float, most: int) -> LayerBounds:
    return LayerBounds(
        load_E=load_E, max_load_W=np.full(W, imbalance * load_E.sum() / W), max_instances_W=np.full(W, most)
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), imbalance=st.sampled_from([1.2, 1.4, 2.0]), most=st.integers(3, 5))
def test_no_placement_has_fewer_hops_than_the_bound(seed: int, imbalance: float, most: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((40, 2, E)) + rng.random((2, E))
    statistics = gather_statistics(np.argsort(-scores, axis=2)[:, :, :2], num_experts=E)
    transitions_EE = statistics.transitions_LEE[0]
    before, after = (bounds_for(load_E, imbalance=imbalance, most=most) for load_E in statistics.load_LE)
    pairs = list(product(placements(before), placements(after)))
    if not pairs:
        return
    best = min(hops(np.eye(W)[one_E], np.eye(W)[other_E], transitions_EE) for one_E, other_E in pairs)
    bound = min_hops_bound(transitions_EE, before, after, known=[pairs[0]], tolerance=0.0)
    assert bound <= best + 1e-9
    assert bound >= 0.6 * best - 1e-6


def test_the_bound_is_reached_where_all_pairs_are_alike() -> None:
    transitions_EE = np.full((4, 4), 1 / 16)
    bounds = LayerBounds(load_E=np.ones(4), max_load_W=np.full(2, 2.0), max_instances_W=np.full(2, 2))
    known = [(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))]
    assert min_hops_bound(transitions_EE, bounds, bounds, known=known) == pytest.approx(0.5, abs=1e-5)


def test_workers_that_differ_are_refused() -> None:
    bounds = LayerBounds(load_E=np.ones(4), max_load_W=np.array([2.0, 3.0]), max_instances_W=np.full(2, 2))
    with pytest.raises(ConfigError, match="bounds must be the same for all workers"):
        min_hops_bound(np.full((4, 4), 1 / 16), bounds, bounds, known=[])
