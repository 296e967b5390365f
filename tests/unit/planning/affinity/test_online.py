from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.cluster import Cluster, ModelShape, WorkerSpec, even_cluster
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import balance_L, hops_L, workers_touched_L
from moeless.planning.affinity.online import AffinityConfig, place_by_affinity
from moeless.planning.affinity.statistics import AffinityStatistics, gather_statistics
from moeless.planning.place import place


def clustered_routing(
    seed: int, *, tokens: int = 60, layers: int = 3, experts: int = 8, top_k: int = 2, num_topics: int = 4
) -> np.ndarray:
    """Each token has a topic, in each layer of other experts, which draws it to some of them."""
    rng = np.random.default_rng(seed)
    topic_LE = np.stack([rng.permutation(experts) % num_topics for _ in range(layers)])
    topic_T = rng.integers(num_topics, size=tokens)
    scores = rng.random((tokens, layers, experts)) + 0.7 * (topic_LE == topic_T[:, np.newaxis, np.newaxis])
    return np.argsort(-scores, axis=2)[:, :, :top_k]


def model_of(statistics: AffinityStatistics) -> ModelShape:
    return ModelShape(
        num_layers=statistics.num_layers,
        num_experts=statistics.num_experts,
        top_k=statistics.top_k,
        expert_bytes=1,
        hidden_bytes=1,
    )


def cost(plan: Plan, statistics: AffinityStatistics, objective: str) -> float:
    return float((workers_touched_L if objective == "workers" else hops_L)(plan, statistics).sum())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Plan, AffinityStatistics, np.ndarray, Cluster, ModelShape]:
    """A balanced start, with replicas, on workers that differ in speed, with little memory to spare."""
    statistics = gather_statistics(clustered_routing(draw(st.integers(0, 1000))), num_experts=8)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    counts_LE = 1 + rng.integers(0, draw(st.integers(1, 2)), size=(3, 8), endpoint=True) // 2
    memory = -(-int(counts_LE.sum()) // 3) + draw(st.integers(0, 3))
    speeds = draw(st.sampled_from([(1.0, 1.0, 1.0), (1.0, 2.0, 1.5)]))
    cluster = Cluster(
        workers=tuple(WorkerSpec(name=f"w{i}", memory_bytes=memory, speed=speed) for i, speed in enumerate(speeds))
    )
    load_LE = statistics.load_LE * rng.uniform(0.8, 1.2, size=(3, 8)) * 100
    model = model_of(statistics)
    return place(counts_LE, load_LE, cluster, model), statistics, load_LE, cluster, model


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    objective=st.sampled_from(["workers", "hops"]),
    max_moves=st.sampled_from([None, 0, 1, 3, 7]),
    max_imbalance=st.sampled_from([1.0, 1.1, 1.5]),
    max_instances=st.sampled_from([None, 3, 6]),
    num_kicks=st.integers(0, 2),
)
def test_no_bound_is_broken_and_the_start_is_never_better(
    problem: tuple[Plan, AffinityStatistics, np.ndarray, Cluster, ModelShape],
    objective: Any,
    max_moves: int | None,
    max_imbalance: float,
    max_instances: int | None,
    num_kicks: int,
) -> None:
    start, statistics, load_LE, cluster, model = problem
    config = AffinityConfig(
        objective=objective,
        max_moves=max_moves,
        max_imbalance=max_imbalance,
        max_instances=max_instances,
        num_kicks=num_kicks,
    )
    plan = place_by_affinity(*problem, config=config)
    assert cost(plan, statistics, objective) <= cost(start, statistics, objective) + 1e-9
    max_L = np.maximum(max_imbalance, balance_L(start, load_LE, cluster.speed_W))
    assert (balance_L(plan, load_LE, cluster.speed_W) <= max_L + 1e-6).all()
    np.testing.assert_array_equal(plan.counts_LE, start.counts_LE)
    assert (np.bincount(plan.worker_N, minlength=3) <= cluster.capacity_W(model)).all()
    hosted_LW, start_LW = (p.dense()[0].sum(axis=1) for p in (plan, start))
    allowed_LW = start_LW.max(axis=1, keepdims=True) if max_instances is None else max_instances
    assert (hosted_LW <= np.maximum(start_LW, allowed_LW)).all()
    if max_moves is not None:
        assert len(plan.started_since(start)) <= max_moves
    if plan is not start:
        assert plan.version == start.version + 1
    again = place_by_affinity(*problem, config=config)
    np.testing.assert_array_equal(again.keys_N, plan.keys_N)
    np.testing.assert_array_equal(again.share_N, plan.share_N)


def problem_of(choices: np.ndarray, num_experts: int, num_workers: int) -> tuple[Any, ...]:
    statistics = gather_statistics(choices, num_experts=num_experts)
    model, cluster = model_of(statistics), even_cluster(num_workers, memory_bytes=1000)
    counts_LE = np.ones((model.num_layers, model.num_experts), dtype=np.int64)
    return place(counts_LE, statistics.load_LE, cluster, model), statistics, statistics.load_LE, cluster, model


def test_experts_that_fire_together_go_together() -> None:
    pairs = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]])
    start, *rest = problem_of(pairs, 8, 4)
    assert workers_touched_L(start, rest[0]).tolist() == [2.0]
    plan = place_by_affinity(start, *rest)
    assert workers_touched_L(plan, rest[0]).tolist() == [1.0]
    assert balance_L(plan, rest[1], np.ones(4)).tolist() == [1.0]


def test_experts_that_fire_one_after_the_other_go_together() -> None:
    shift = np.arange(4)
    chain = np.stack([shift, (shift + 1) % 4, (shift + 3) % 4], axis=1)[..., np.newaxis]
    start, *rest = problem_of(chain, 4, 4)
    assert hops_L(start, rest[0]).tolist() == [1.0, 1.0]
    plan = place_by_affinity(start, *rest, config=AffinityConfig(objective="hops"))
    assert hops_L(plan, rest[0]).tolist() == [0.0, 0.0]


def test_few_moves_are_spent_where_they_gain_most() -> None:
    # In the first layer experts go together always, in the second by chance.
    choices = np.array([[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 1], [0, 2]], [[2, 3], [1, 3]]])
    start, *rest = problem_of(choices, 4, 2)
    plan = place_by_affinity(start, *rest, config=AffinityConfig(max_moves=2))
    assert plan.layer_N[plan.started_since(start)].tolist() == [0, 0]
    assert workers_touched_L(plan, rest[0]).tolist() == [1.0, 1.5]


def test_a_plan_that_is_good_enough_stays() -> None:
    pairs = np.array([[[0, 1]], [[2, 3]]])
    start, *rest = problem_of(pairs, 4, 2)
    plan = place_by_affinity(start, *rest)
    assert place_by_affinity(plan, *rest) is plan


@pytest.mark.parametrize("objective", ["workers", "hops"])
def test_a_layer_that_cannot_be_brought_back_to_balance_falls_back(objective: Any) -> None:
    # Few placements are as balanced as the start, and by single swaps the search does not find back to one.
    choices = clustered_routing(4, tokens=300, layers=2, experts=12, top_k=3)
    start, statistics, load_LE, _, model = problem_of(choices, 12, 4)
    config = AffinityConfig(objective=objective, max_imbalance=1.0, max_instances=5, num_kicks=3)
    for memory in (6, 100):  # as much as the start needs, and plenty
        full = even_cluster(4, memory_bytes=memory)
        plan = place_by_affinity(start, statistics, load_LE, full, model, config=config)
        assert cost(plan, statistics, objective) <= cost(start, statistics, objective)
        assert (balance_L(plan, load_LE, np.ones(4)) <= balance_L(start, load_LE, np.ones(4)) + 1e-6).all()
        assert np.bincount(plan.worker_N, minlength=4).max() <= memory


def test_kicks_find_what_a_descent_does_not() -> None:
    choices = clustered_routing(1, tokens=300, layers=1, experts=24, top_k=3, num_topics=6)
    start, statistics, *rest = problem_of(choices, 24, 6)
    costs = [
        cost(place_by_affinity(start, statistics, *rest, config=AffinityConfig(num_kicks=kicks)), statistics, "workers")
        for kicks in (0, 10)
    ]
    assert costs[1] < 0.97 * costs[0]


def test_functions_without_an_instance_are_left_out() -> None:
    start, statistics, load_LE, cluster, model = problem_of(clustered_routing(0), 8, 4)
    keep_N = (start.layer_N != 1) & (start.expert_N != 2)
    part = Plan.from_instances(
        version=1,
        num_layers=3,
        num_experts=8,
        num_workers=4,
        layer_N=start.layer_N[keep_N],
        expert_N=start.expert_N[keep_N],
        worker_N=start.worker_N[keep_N],
        share_N=start.share_N[keep_N],
    )
    for objective in ("workers", "hops"):
        config = AffinityConfig(objective=objective, max_imbalance=2.0, max_instances=4)  # type: ignore[arg-type]
        plan = place_by_affinity(part, statistics, load_LE, cluster, model, config=config)
        np.testing.assert_array_equal(plan.counts_LE, part.counts_LE)
        assert objective == "hops" or plan is not part


def test_an_instance_does_not_move_for_less_than_the_least_gain() -> None:
    pairs = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]])
    start, *rest = problem_of(pairs, 8, 4)
    # The first swap unites one of four pairs at least: an eighth of the two workers for each of two instances.
    assert place_by_affinity(start, *rest, config=AffinityConfig(max_moves=8, min_gain=0.3)) is start
    assert place_by_affinity(start, *rest, config=AffinityConfig(max_moves=8, min_gain=0.05)) is not start


def test_the_search_works_with_many_experts_and_replicas() -> None:
    choices = clustered_routing(1, tokens=2000, layers=2, experts=64, top_k=6, num_topics=8)
    statistics = gather_statistics(choices, num_experts=64)
    model, cluster = model_of(statistics), even_cluster(8, memory_bytes=1000)
    counts_LE = np.ones((2, 64), dtype=np.int64)
    counts_LE[:, :8] = 2
    start = place(counts_LE, statistics.load_LE, cluster, model)
    for objective in ("workers", "hops"):
        plan = place_by_affinity(
            start, statistics, statistics.load_LE, cluster, model, config=AffinityConfig(objective=objective)
        )
        assert cost(plan, statistics, objective) < 0.9 * cost(start, statistics, objective)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "speed"}, "affinity.objective must be workers or hops, got 'speed'"),
        ({"max_imbalance": 0.9}, "affinity.max_imbalance must be at least 1, got 0.9"),
        ({"max_instances": 0}, "affinity.max_instances must be at least 1, got 0"),
        ({"max_moves": -1}, "affinity.max_moves must be at least 0, got -1"),
        ({"num_kicks": -1}, "affinity.num_kicks must be at least 0, got -1"),
        ({"min_gain": -0.1}, "affinity.min_gain must be at least 0, got -0.1"),
        ({"seed": -1}, "affinity.seed must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AffinityConfig(**changed)


def test_arguments_of_different_shapes_are_refused() -> None:
    start, statistics, load_LE, cluster, model = problem_of(clustered_routing(0), 8, 4)
    with pytest.raises(
        ConfigError, match="load_LE must be finite, >= 0 and of \\(3, 8\\) layers and experts, got \\(2, 8\\)"
    ):
        place_by_affinity(start, statistics, load_LE[1:], cluster, model)
    with pytest.raises(ConfigError, match="start must be a plan for 3 workers, got one for 4"):
        place_by_affinity(start, statistics, load_LE, even_cluster(3, memory_bytes=1000), model)
