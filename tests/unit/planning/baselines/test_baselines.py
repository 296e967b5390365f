from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import even_cluster
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.baselines.eplb import EplbPlanner, eplb_global, eplb_hierarchical, replicate
from moeless.planning.baselines.static import StaticPlanner, random_placement, round_robin, static_expert_parallelism
from moeless.planning.observation import Observation
from moeless.planning.place import InfeasiblePlacementError
from tests.support.planning import assert_whole, cluster_of, clusters, fits, model_of, workers_of


def with_slots(num_layers: int, num_experts: int, slots: int) -> IntArray:
    """Counts of which EPLB takes the sum."""
    counts_LE = np.ones((num_layers, num_experts), dtype=np.int64)
    counts_LE[:, 0] += slots - num_experts
    return counts_LE


def hosted(plan: Plan, layer: int = 0) -> list[list[int]]:
    """The experts of each worker."""
    is_here_N = plan.layer_N == layer
    return [sorted(plan.expert_N[is_here_N & (plan.worker_N == worker)].tolist()) for worker in range(plan.num_workers)]


def by_expert(plan: Plan) -> list[list[int]]:
    """The workers of each function, layer by layer."""
    workers = workers_of(plan)
    return [workers.get((layer, expert), []) for layer in range(plan.num_layers) for expert in range(plan.num_experts)]


def test_static_puts_contiguous_experts_on_a_worker_in_every_layer() -> None:
    model = model_of(2, 6)
    plan = static_expert_parallelism(np.ones((2, 6), dtype=np.int64), np.ones((2, 6)), cluster_of([4, 4, 4]), model)
    assert hosted(plan, 0) == hosted(plan, 1) == [[0, 1], [2, 3], [4, 5]]


def test_static_gives_some_workers_one_more_where_they_do_not_divide_the_experts() -> None:
    model = model_of(1, 7)
    plan = static_expert_parallelism(np.ones((1, 7), dtype=np.int64), np.ones((1, 7)), cluster_of([9, 9, 9]), model)
    assert hosted(plan) == [[0, 1, 2], [3, 4], [5, 6]]


def test_static_leaves_workers_empty_where_there_are_more_than_experts() -> None:
    model = model_of(1, 2)
    plan = static_expert_parallelism(np.ones((1, 2), dtype=np.int64), np.ones((1, 2)), cluster_of([9] * 4), model)
    assert hosted(plan) == [[0], [], [1], []]


def test_static_minds_neither_loads_nor_counts() -> None:
    model, cluster = model_of(1, 4), cluster_of([4, 4])
    one = static_expert_parallelism(np.array([[1, 1, 1, 1]]), np.array([[1.0, 1.0, 1.0, 1.0]]), cluster, model)
    other = static_expert_parallelism(np.array([[0, 2, 2, 2]]), np.array([[9.0, 0.0, 0.0, 1.0]]), cluster, model)
    assert hosted(one) == hosted(other) == [[0, 1], [2, 3]]


def test_static_names_a_worker_without_memory_for_its_part() -> None:
    with pytest.raises(InfeasiblePlacementError, match="worker w1 must host 4 instances, and 3 fit its memory"):
        static_expert_parallelism(np.ones((2, 4), dtype=np.int64), np.ones((2, 4)), cluster_of([9, 3]), model_of(2, 4))


def test_round_robin_deals_instances_to_the_workers_in_turn() -> None:
    plan = round_robin(np.array([[1, 2, 1], [0, 1, 3]]), np.ones((2, 3)), cluster_of([9, 9, 9]), model_of(2, 3))
    assert by_expert(plan) == [[0], [1, 2], [0], [], [1], [0, 1, 2]]


def test_round_robin_gives_replicas_the_same_share() -> None:
    plan = round_robin(np.array([[1, 2, 3]]), np.ones((1, 3)), cluster_of([9, 9, 9]), model_of(1, 3))
    assert plan.share_N.tolist() == pytest.approx([1.0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])


def test_round_robin_names_a_worker_without_memory_for_its_turns() -> None:
    with pytest.raises(InfeasiblePlacementError, match="worker w0 must host 2 instances, and 1 fit its memory"):
        round_robin(np.array([[1, 1, 1]]), np.ones((1, 3)), cluster_of([1, 9]), model_of(1, 3))


def test_round_robin_refuses_more_instances_than_workers() -> None:
    with pytest.raises(InfeasiblePlacementError, match="counts_LE must be at most the 2 workers .* got 3"):
        round_robin(np.array([[3, 1, 1]]), np.ones((1, 3)), cluster_of([9, 9]), model_of(1, 3))


def test_a_seed_makes_one_random_plan_and_another_seed_another() -> None:
    counts_LE, load_LE, cluster, model = (
        np.ones((2, 8), dtype=np.int64),
        np.ones((2, 8)),
        cluster_of([9] * 4),
        model_of(2, 8),
    )
    plans = [random_placement(counts_LE, load_LE, cluster, model, seed=seed) for seed in (3, 3, 4)]
    assert by_expert(plans[0]) == by_expert(plans[1]) != by_expert(plans[2])


def test_every_worker_is_as_likely_at_random() -> None:
    model, cluster = model_of(1, 1), cluster_of([1] * 4)
    plans = [random_placement(np.array([[2]]), np.ones((1, 1)), cluster, model, seed=seed) for seed in range(400)]
    times = np.bincount(np.concatenate([plan.worker_N for plan in plans]))
    assert times.min() > 160  # of 200; less by chance in one of 20,000


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_whatever_fits_is_placed_at_random_within_memory(data: st.DataObject, seed: int) -> None:
    model = model_of(2, 3)
    cluster = data.draw(clusters(min_memory=0, max_memory=6))
    counts_LE = np.random.default_rng(seed).integers(0, cluster.num_workers, (2, 3), endpoint=True)
    while not fits(counts_LE, cluster.capacity_W(model)):
        counts_LE[np.unravel_index(np.argmax(counts_LE), counts_LE.shape)] -= 1
    plan = random_placement(counts_LE, np.ones((2, 3)), cluster, model, seed=seed)
    assert_whole(plan, cluster, model)
    np.testing.assert_array_equal(plan.counts_LE, counts_LE)


def test_random_placement_refuses_counts_that_do_not_fit() -> None:
    with pytest.raises(InfeasiblePlacementError, match="counts_LE must sum to at most the 2 instances .* got 3"):
        random_placement(np.array([[1, 1, 1]]), np.ones((1, 3)), cluster_of([1, 1]), model_of(1, 3))


def one_by_one(loads: list[int], slots: int, most: int) -> list[int]:
    """EPLB's rule as it is told."""
    counts = np.ones(len(loads), dtype=np.int64)
    for _ in range(slots - len(loads)):
        each = np.where(counts < most, np.array(loads) / counts, -1.0)
        if each.max() < 0:
            break
        counts[int(each.argmax())] += 1
    result: list[int] = counts.tolist()
    return result


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 12), st.integers(1, 5))
def test_eplbs_slots_go_one_by_one_to_the_highest_load_per_replica(loads: list[int], extra: int, most: int) -> None:
    slots = len(loads) + extra
    assert replicate(np.array(loads, dtype=np.float64), slots, max_replicas=most).tolist() == one_by_one(
        loads, slots, most
    )


def test_eplb_gives_the_hot_expert_the_slot_and_balances_workers() -> None:
    # Expert 0 twice, at 6 each; then 6, 6, 5, 4, 3, 2 to the least loaded with room: 6 + 5 + 2 and 6 + 4 + 3.
    load_LE = np.array([[12.0, 2.0, 5.0, 4.0, 3.0]])
    plan = eplb_global(with_slots(1, 5, 6), load_LE, cluster_of([3, 3]), model_of(1, 5))
    assert hosted(plan) == [[0, 1, 2], [0, 3, 4]]
    assert plan.worker_load_LW(load_LE).tolist() == [[13.0, 13.0]]


def test_eplb_packs_the_same_number_on_each_worker_whatever_the_balance() -> None:
    # 9 alone would be balance enough; but each worker has two.
    plan = eplb_global(with_slots(1, 4, 4), np.array([[9.0, 1.0, 2.0, 3.0]]), cluster_of([2, 2]), model_of(1, 4))
    assert hosted(plan) == [[0, 1], [2, 3]]


def test_eplb_plans_each_layer_for_its_own_load() -> None:
    load_LE = np.array([[9.0, 1.0, 1.0], [1.0, 1.0, 9.0]])
    plan = eplb_global(with_slots(2, 3, 4), load_LE, cluster_of([4, 4]), model_of(2, 3))
    assert plan.counts_LE.tolist() == [[2, 1, 1], [1, 1, 2]]


def test_eplb_gives_replicas_the_same_share() -> None:
    plan = eplb_global(with_slots(1, 2, 4), np.array([[9.0, 1.0]]), cluster_of([9, 9, 9]), model_of(1, 2))
    assert plan.share_N.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_eplb_gives_the_first_workers_the_slots_that_are_over() -> None:
    plan = eplb_global(with_slots(1, 5, 5), np.ones((1, 5)), cluster_of([2, 2, 2]), model_of(1, 5))
    assert [len(experts) for experts in hosted(plan)] == [2, 2, 1]


def test_eplb_has_a_function_at_most_once_on_a_worker_while_there_are_workers() -> None:
    plan = eplb_global(with_slots(1, 2, 9), np.array([[99.0, 1.0]]), cluster_of([9, 9]), model_of(1, 2))
    assert by_expert(plan) == [[0, 1], [0, 1]]


def test_eplb_refuses_fewer_slots_than_experts() -> None:
    with pytest.raises(
        InfeasiblePlacementError,
        match="counts_LE: EPLB keeps every expert resident and needs 3 instances a layer, got 2",
    ):
        eplb_global(np.array([[1, 0, 1]]), np.ones((1, 3)), cluster_of([9, 9]), model_of(1, 3))


def test_eplb_names_a_worker_without_memory_for_its_slots() -> None:
    with pytest.raises(InfeasiblePlacementError, match="worker w1 must host 2 instances, and 1 fit its memory"):
        eplb_global(with_slots(1, 4, 4), np.ones((1, 4)), cluster_of([9, 1]), model_of(1, 4))


README_LOAD = np.array(
    [
        [90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20.0, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
"""The example of EPLB's README: 2 layers of 12 experts in 4 groups, 16 slots, 2 nodes, 8 GPUs of 2 slots."""


def test_the_example_of_eplbs_readme_comes_out_the_same() -> None:
    cluster = even_cluster(8, memory_bytes=4, workers_per_node=4)
    plan = eplb_hierarchical(with_slots(2, 12, 16), README_LOAD, cluster, model_of(2, 12), num_groups=4)
    for layer, slots in enumerate(README_MAP):
        # A worker's slots have no order here.
        assert hosted(plan, layer) == [sorted(slots[i : i + 2]) for i in range(0, 16, 2)]


def test_groups_are_packed_to_nodes_heaviest_first_and_as_many_to_each() -> None:
    # Groups of two: 9, 8, 5 and 4. Heaviest first: 9 and 4 to the one node, 8 and 5 to the other.
    load_LE = np.array([[8.0, 1.0, 3.0, 2.0, 3.0, 1.0, 4.0, 4.0]])
    cluster = cluster_of([2] * 4, nodes=["a", "b", "a", "b"])
    plan = eplb_hierarchical(with_slots(1, 8, 8), load_LE, cluster, model_of(1, 8), num_groups=4)
    # Then in the first 8, 3, 1, 1 and in the second 4, 4, 3, 2, two on each worker.
    assert hosted(plan) == [[0, 5], [2, 6], [1, 4], [3, 7]]


def test_with_one_node_the_hierarchical_form_is_the_global_one() -> None:
    arguments = with_slots(2, 12, 16), README_LOAD, cluster_of([9] * 4), model_of(2, 12)
    assert by_expert(eplb_hierarchical(*arguments, num_groups=1)) == by_expert(eplb_global(*arguments))


@pytest.mark.parametrize("num_groups", [0, 3, 5])
def test_groups_that_do_not_fit_the_experts_and_nodes_are_refused(num_groups: int) -> None:
    cluster = even_cluster(4, memory_bytes=9, workers_per_node=2)
    with pytest.raises(
        ConfigError,
        match=f"num_groups must divide the 12 experts and be a multiple of the 2 nodes, got {num_groups}",
    ):
        eplb_hierarchical(with_slots(1, 12, 12), np.ones((1, 12)), cluster, model_of(1, 12), num_groups=num_groups)


def test_the_hierarchical_form_is_for_nodes_of_equal_size() -> None:
    cluster = even_cluster(3, memory_bytes=9, workers_per_node=2)
    with pytest.raises(ConfigError, match=r"hierarchical EPLB needs as many workers on each node, got \[2, 1\]"):
        eplb_hierarchical(with_slots(1, 12, 12), np.ones((1, 12)), cluster, model_of(1, 12), num_groups=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_the_experts_of_a_group_are_on_one_node(seed: int, extra: int) -> None:
    load_LE = np.random.default_rng(seed).lognormal(0.0, 1.0, (2, 12))
    cluster, model = even_cluster(6, memory_bytes=99, workers_per_node=2), model_of(2, 12)
    plan = eplb_hierarchical(with_slots(2, 12, 12 + extra), load_LE, cluster, model, num_groups=6)
    assert_whole(plan, cluster, model)
    nodes = {(layer, expert // 2, worker // 2) for (layer, expert), at in workers_of(plan).items() for worker in at}
    assert len(nodes) == 2 * 6
    assert np.bincount([layer * 3 + node for layer, _, node in nodes]).tolist() == [2] * 6


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 9))
def test_eplb_keeps_every_expert_and_gives_each_worker_as_many_slots(seed: int, num_workers: int, extra: int) -> None:
    load_LE = np.random.default_rng(seed).lognormal(0.0, 2.0, (2, 6))
    model, cluster = model_of(2, 6), even_cluster(num_workers, memory_bytes=99)
    plan = eplb_global(with_slots(2, 6, 6 + extra), load_LE, cluster, model)
    assert_whole(plan, cluster, model)
    # Where a worker has a function in two slots the plan has one instance with both shares.
    replicas_LE = np.stack([replicate(load_E, 6 + extra, max_replicas=num_workers) for load_E in load_LE])
    slots_LW = (plan.dense()[1] * replicas_LE[:, :, np.newaxis]).sum(axis=1)
    np.testing.assert_allclose(slots_LW, np.round(slots_LW), atol=1e-9)
    assert (slots_LW.max(axis=1) - slots_LW.min(axis=1) <= 1 + 1e-9).all()


def observed(load_LE: FloatArray, num_steps: int) -> Observation:
    """What looks ahead is of no use to those who look back."""
    other_LE = np.flip(load_LE, axis=1)
    return Observation(
        time_s=float(num_steps),
        mean_LE=other_LE,
        upper_LE=other_LE,
        window_LE=load_LE,
        last_used_s_LE=np.full(load_LE.shape, -np.inf),
        num_steps=num_steps,
    )


def hot(expert: int, num_experts: int = 4) -> FloatArray:
    """Most tokens go to one expert."""
    load_LE = np.ones((1, num_experts))
    load_LE[0, expert] = 10.0
    return load_LE


def replicated(plan: Plan) -> list[int]:
    """Experts with more than one instance."""
    experts: list[int] = np.flatnonzero(plan.counts_LE[0] > 1).tolist()
    return experts


def eplb(**changed: Any) -> EplbPlanner:
    settings: dict[str, Any] = {"spare_replicas": 1, "interval_steps": 100, "window_steps": 50, **changed}
    return EplbPlanner(cluster=cluster_of([9, 9]), model=model_of(1, 4), **settings)


def test_the_static_plan_is_for_ever() -> None:
    planner = StaticPlanner(cluster=cluster_of([9, 9]), model=model_of(1, 4))
    plan = planner.plan(observed(hot(0), 0), None)
    assert hosted(plan) == [[0, 1], [2, 3]]
    assert planner.plan(observed(hot(3), 5000), plan) is plan


def test_eplbs_first_plan_is_by_the_load_that_is_known() -> None:
    assert replicated(eplb().plan(observed(hot(2), 10), None)) == [2]


def test_until_a_load_is_known_eplb_takes_all_for_equal() -> None:
    plan = eplb(spare_replicas=4).plan(observed(np.zeros((1, 4)), 0), None)
    assert plan.counts_LE.tolist() == [[2, 2, 2, 2]]


def test_eplb_begins_with_the_load_that_was_recorded_before() -> None:
    planner = eplb()
    first = planner.plan(observed(hot(2), 0), None)
    assert replicated(first) == [2]
    # What was only recorded is not mixed with what is seen.
    assert replicated(planner.plan(observed(hot(1), 100), first)) == [1]


def test_eplbs_plan_is_in_force_for_the_interval() -> None:
    planner = eplb()
    plan = planner.plan(observed(hot(0), 10), None)
    for num_steps in (60, 109):
        assert planner.plan(observed(hot(1), num_steps), plan) is plan
    after = planner.plan(observed(hot(1), 110), plan)
    assert (replicated(after), after.version) == ([1], plan.version + 1)


def test_eplbs_interval_begins_anew_with_each_plan() -> None:
    planner = eplb()
    first = planner.plan(observed(hot(0), 10), None)
    second = planner.plan(observed(hot(1), 150), first)
    assert planner.plan(observed(hot(2), 249), second) is second
    assert replicated(planner.plan(observed(hot(2), 250), second)) == [2]


def test_eplb_forgets_what_was_before_the_window() -> None:
    planner = eplb()
    plan = planner.plan(observed(hot(0), 10), None)
    planner.plan(observed(hot(1) * 100, 50), plan)
    assert replicated(planner.plan(observed(hot(2), 110), plan)) == [2]


def test_what_reaches_into_eplbs_window_counts_whole() -> None:
    planner = eplb()
    plan = planner.plan(observed(hot(0), 10), None)
    planner.plan(observed(hot(1) * 100, 61), plan)
    assert replicated(planner.plan(observed(hot(2), 110), plan)) == [1]


def test_eplb_counts_loads_by_their_steps() -> None:
    planner = eplb(window_steps=100)
    plan = planner.plan(observed(hot(0), 10), None)
    planner.plan(observed(hot(1), 90), plan)
    planner.plan(observed(hot(2), 100), plan)
    assert replicated(planner.plan(observed(hot(2), 110), plan)) == [1]


def test_eplb_counts_the_same_steps_once() -> None:
    planner = eplb()
    plan = planner.plan(observed(hot(0), 10), None)
    for _ in range(5):
        planner.plan(observed(hot(1), 84), plan)
    planner.plan(observed(hot(2) * 3.0, 109), plan)
    assert replicated(planner.plan(observed(hot(2) * 3.0, 110), plan)) == [2]


def test_eplbs_spare_replicas_come_beside_one_for_each_expert() -> None:
    plan = eplb(spare_replicas=3).plan(observed(np.array([[9.0, 1.0, 1.0, 8.0]]), 10), None)
    assert plan.counts_LE.sum() == 4 + 3


def test_eplb_with_groups_is_hierarchical() -> None:
    cluster = even_cluster(8, memory_bytes=4, workers_per_node=4)
    planner = EplbPlanner(cluster=cluster, model=model_of(2, 12), spare_replicas=4, num_groups=4)
    plan = planner.plan(observed(README_LOAD, 10), None)
    assert hosted(plan, 1)[0] == [7, 10]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spare_replicas": -1}, "eplb.spare_replicas must be at least 0, got -1"),
        ({"interval_steps": 0}, "eplb.interval_steps must be at least 1, got 0"),
        ({"window_steps": 0}, "eplb.window_steps must be at least 1, got 0"),
    ],
)
def test_eplb_settings_that_cannot_be_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eplb(**changed)
