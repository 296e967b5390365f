from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray
from moeless.core.cluster import Cluster, ModelShape, WorkerSpec, even_cluster
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import balance_L, hops_L, workers_touched_L
from moeless.planning.affinity.offline import ProgrammeConfig, min_hops_plan, min_workers_plan
from moeless.planning.affinity.online import AffinityConfig, layer_bounds, place_by_affinity
from moeless.planning.affinity.programme import min_hops
from moeless.planning.affinity.statistics import AffinityStatistics, gather_statistics
from moeless.planning.place import place

Problem = tuple[Plan, AffinityStatistics, FloatArray, Cluster, ModelShape]


def problem_of(seed: int, *, experts: int = 8, layers: int = 2, workers: int = 4, topics: int = 4) -> Problem:
    rng = np.random.default_rng(seed)
    topic_LE = np.stack([rng.permutation(experts) % topics for _ in range(layers)])
    topic_T = rng.integers(topics, size=200)
    scores = rng.random((200, layers, experts)) + 0.5 * (topic_LE == topic_T[:, np.newaxis, np.newaxis])
    statistics = gather_statistics(np.argsort(-scores, axis=2)[:, :, :2], num_experts=experts)
    model = ModelShape(num_layers=layers, num_experts=experts, top_k=2, expert_bytes=1, hidden_bytes=1)
    cluster = even_cluster(workers, memory_bytes=1000)
    start = place(np.ones((layers, experts), dtype=np.int64), statistics.load_LE, cluster, model)
    return start, statistics, statistics.load_LE, cluster, model


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), max_imbalance=st.sampled_from([1.05, 1.2]))
def test_the_local_search_is_within_2_percent_of_the_fewest_workers(seed: int, max_imbalance: float) -> None:
    problem = problem_of(seed)
    config = AffinityConfig(max_imbalance=max_imbalance, max_instances=3, num_kicks=20)
    found = place_by_affinity(*problem, config=config)
    optimal = min_workers_plan(*problem, affinity=config)
    assert optimal.bound_L is not None
    assert optimal.gap <= 1e-6
    np.testing.assert_allclose(workers_touched_L(optimal.plan, problem[1]), optimal.bound_L, atol=1e-6)
    assert workers_touched_L(found, problem[1]).sum() <= 1.02 * optimal.bound_L.sum() + 1e-9
    max_L = np.maximum(max_imbalance, balance_L(problem[0], problem[2], np.ones(4)))
    assert (balance_L(optimal.plan, problem[2], np.ones(4)) <= max_L + 1e-6).all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_local_search_is_within_2_percent_of_the_fewest_hops(seed: int) -> None:
    problem = problem_of(seed, experts=4, workers=2, layers=3, topics=2)
    config = AffinityConfig(objective="hops", max_imbalance=1.2, num_kicks=20)
    optimum = min_hops(problem[1].transitions_LEE, layer_bounds(problem[0], problem[2], problem[3].speed_W, config))
    assert optimum.gap <= 1e-6
    found = place_by_affinity(*problem, config=config)
    assert hops_L(found, problem[1]).sum() <= 1.02 * optimum.cost + 1e-9


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_layer_by_layer_hops_never_rise_and_bounds_hold(seed: int) -> None:
    problem = problem_of(seed, layers=3)
    config = AffinityConfig(objective="hops", max_imbalance=1.2, max_instances=3)
    result = min_hops_plan(*problem, affinity=config)
    assert result.bound_L is None
    assert result.gap <= 1e-6
    assert hops_L(result.plan, problem[1]).sum() <= hops_L(problem[0], problem[1]).sum() + 1e-9
    max_L = np.maximum(1.2, balance_L(problem[0], problem[2], np.ones(4)))
    assert (balance_L(result.plan, problem[2], np.ones(4)) <= max_L + 1e-6).all()
    assert (result.plan.dense()[0].sum(axis=1) <= 3).all()
    assert min_hops_plan(result.plan, *problem[1:], affinity=config).plan is result.plan


def test_workers_are_named_so_that_most_instances_stay() -> None:
    problem = problem_of(3)
    config = AffinityConfig(max_imbalance=1.2)
    best = min_workers_plan(*problem, affinity=config).plan
    swapped = Plan.from_instances(
        version=1, num_layers=2, num_experts=8, num_workers=4, layer_N=best.layer_N, expert_N=best.expert_N,
        worker_N=(best.worker_N + 1) % 4, share_N=best.share_N,
    )  # fmt: skip
    assert min_workers_plan(swapped, *problem[1:], affinity=config).plan is swapped


def test_workers_that_differ_and_many_groups_are_solved_by_sets() -> None:
    start, statistics, load_LE, _, model = problem_of(5)
    cluster = Cluster(workers=tuple(WorkerSpec(name=f"w{i}", memory_bytes=100, speed=1 + i % 2) for i in range(4)))
    start = place(start.counts_LE, load_LE, cluster, model)
    config = AffinityConfig(max_imbalance=1.3)
    result = min_workers_plan(
        start, statistics, load_LE, cluster, model, affinity=config, config=ProgrammeConfig(max_sets=None)
    )
    assert result.bound_L is not None
    assert result.gap <= 1e-6
    few = min_workers_plan(*problem_of(5), affinity=config, config=ProgrammeConfig(max_groups=0, max_sets=None))
    by_groups = min_workers_plan(*problem_of(5), affinity=config)
    assert few.bound_L is not None
    np.testing.assert_allclose(few.bound_L, by_groups.bound_L, atol=1e-6)


def test_full_workers_only_swap() -> None:
    start, statistics, load_LE, _, model = problem_of(7)
    cluster = even_cluster(4, memory_bytes=4)  # two of each layer
    start = place(start.counts_LE, load_LE, cluster, model)
    config = AffinityConfig(max_imbalance=1.5, max_instances=4)
    for plan in (
        min_workers_plan(start, statistics, load_LE, cluster, model, affinity=config).plan,
        min_hops_plan(start, statistics, load_LE, cluster, model, affinity=config).plan,
    ):
        assert np.bincount(plan.worker_N).tolist() == [4, 4, 4, 4]


def test_replicas_are_refused_where_workers_touched_are_optimised() -> None:
    start, statistics, load_LE, cluster, model = problem_of(0)
    counts_LE = start.counts_LE.copy()
    counts_LE[1, 3] = 2
    start = place(counts_LE, load_LE, cluster, model)
    with pytest.raises(ConfigError, match="start must have one instance of every function, got 2 of L01.E003"):
        min_workers_plan(start, statistics, load_LE, cluster, model, affinity=AffinityConfig())


@pytest.mark.parametrize("name", ["max_groups", "max_sets", "max_sweeps"])
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"programme.{name} must be at least"):
        ProgrammeConfig(**{name: -1})
