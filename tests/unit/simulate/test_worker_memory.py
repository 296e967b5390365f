from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moeless.core.cluster import even_cluster
from moeless.core.plan import Plan
from moeless.planning.cost import CostProfile
from moeless.planning.rollout import RolloutOrderError
from moeless.simulate.scenario import Scenario, TransferConfig
from moeless.simulate.worker_memory import ColdStart, WorkerMemory

MakePlan = Callable[..., Plan]
START_S = 0.01
EXPERT_BYTES = 1_000_000


def without(plan: Plan, *experts: int) -> Plan:
    """The plan less these experts of layer 0."""
    stays_N = ~((plan.layer_N == 0) & np.isin(plan.expert_N, experts))
    return replace(
        plan,
        layer_N=plan.layer_N[stays_N],
        expert_N=plan.expert_N[stays_N],
        worker_N=plan.worker_N[stays_N],
        share_N=plan.share_N[stays_N],
    )


@pytest.fixture
def make_memory(make_scenario: Callable[..., Scenario]) -> Callable[..., WorkerMemory]:
    def make(plan: Plan, *, room: int = 100) -> WorkerMemory:
        scenario = make_scenario()
        profile: CostProfile = scenario.profile
        cluster = replace(even_cluster(4, memory_bytes=room * EXPERT_BYTES), fetch_bytes_per_s=EXPERT_BYTES / START_S)
        sample_MLk = np.zeros((1, 3, 2), dtype=np.int64)
        return WorkerMemory(plan, cluster, profile, TransferConfig(transfer_share=0), sample_MLk, seed=0)

    return make


def start(memory: WorkerMemory, *experts: int, now_s: float = 0.0) -> list[ColdStart]:
    return memory.host_cold(np.array(experts), np.full(24, -np.inf), now_s)


def test_a_function_without_an_instance_goes_where_most_memory_is_free(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    memory = make_memory(without(spread_plan(3, 8, 4), 6, 7))  # both of worker 3
    assert start(memory, 6) == [ColdStart(3, False)]
    assert memory.serving.has_C[6]
    assert (memory.num_starts, memory.num_resident) == (1, 23)


def test_what_a_plan_starts_already_is_not_started_twice(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(without(whole, 4, 5, 6, 7))
    memory.change_to(replace(whole, version=2), 0.0)
    resident, starts = memory.num_resident, memory.num_starts
    assert start(memory, 6) == [ColdStart(3, True)]
    assert (memory.num_resident, memory.num_starts) == (resident, starts)
    assert start(memory, 0 + 5) == [ColdStart(2, True)]
    memory.publish(1.0)
    assert memory.serving.plan.num_instances == 24


def test_what_a_step_waits_for_starts_before_what_a_plan_starts(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(without(whole, 4, 5, 6, 7))
    assert memory.change_to(replace(whole, version=2), 0.0) == pytest.approx(2 * START_S)
    (pending,) = start(memory, 7)
    assert memory.start_cold(pending, 0.0) == pytest.approx(START_S)
    assert memory.start_cold(pending, 0.0) == pytest.approx(2 * START_S)


def test_a_plan_is_ready_later_by_what_steps_had_to_start_before_it(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(without(whole, 0, 6, 7))
    target = without(whole, 0)  # two starts on worker 3; expert 0 is a step's own, and worker 0's memory the freest
    assert memory.change_to(replace(target, version=2), 0.0) == memory.target_ready_s == pytest.approx(2 * START_S)
    (own,) = start(memory, 0)
    memory.start_cold(own, 0.0)
    assert own == ColdStart(0, False)
    assert memory.target_ready_s == pytest.approx(2 * START_S)  # on another worker
    memory.start_cold(ColdStart(3, False), 0.5 * START_S)
    assert memory.target_ready_s == pytest.approx(3 * START_S)
    memory.start_cold(ColdStart(3, True), 0.5 * START_S)  # one of its own, only earlier
    assert memory.target_ready_s == pytest.approx(3 * START_S)
    memory.start_cold(ColdStart(3, False), 9 * START_S)  # after it
    assert memory.target_ready_s == pytest.approx(3 * START_S)


def test_a_plan_is_not_published_before_its_weights_are_there(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(without(whole, 6, 7))
    ready_s = memory.change_to(replace(whole, version=2), 0.0)
    memory.start_cold(ColdStart(3, False), 0.5 * START_S)  # goes before, on the same worker
    assert memory.target_ready_s > ready_s
    with pytest.raises(RolloutOrderError, match=r"got L00.E006 cold on worker 3"):
        memory.publish(ready_s)
    assert memory.is_changing
    memory.publish(memory.target_ready_s)
    assert memory.serving.plan.num_instances == 24


def test_what_a_plan_leaves_out_stays_until_every_engine_has_ended_its_step(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(whole)
    memory.change_to(replace(without(whole, 6, 7), version=2), 0.0)
    memory.publish(1.0, engines=[0, 1])
    assert (memory.serving.plan.num_instances, memory.num_resident) == (22, 24)
    memory.acknowledge(0, 2.0)
    assert (memory.num_resident, memory.is_changing) == (24, True)
    memory.acknowledge(1, 3.0)
    assert (memory.num_resident, memory.is_changing) == (22, False)
    assert memory.instance_s == 24 * 3.0


def test_an_instance_evicted_for_a_step_is_not_published(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    whole = spread_plan(3, 8, 4)
    memory = make_memory(without(whole, 7), room=5)  # worker 3 has five instances, the others six
    target = without(whole, 7)
    memory.change_to(replace(target, version=2), 0.0)
    (own,) = memory.host_cold(np.array([7]), np.arange(24.0), 0.0)
    gone = np.setdiff1d(target.keys_N, memory.serving.plan.keys_N)
    assert len(gone) == memory.num_evicted == 1
    memory.publish(memory.start_cold(own, 0.0))
    assert not memory.serving.plan.has(gone).any()
    assert memory.serving.has_C[7]


def test_what_a_step_waits_for_waits_its_turn_behind_another(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    memory = make_memory(without(spread_plan(3, 8, 4), 6, 7))
    starts = start(memory, 6, 7)
    assert [found.worker for found in starts] == [3, 3]
    assert [memory.start_cold(found, 5.0) for found in starts] == pytest.approx([5 + START_S, 5 + 2 * START_S])


def test_where_no_memory_is_free_the_function_goes_that_was_unused_for_longest(
    make_memory: Callable[..., WorkerMemory], spread_plan: MakePlan
) -> None:
    memory = make_memory(without(spread_plan(3, 8, 4), 7), room=6)
    (first,) = start(memory, 7)
    assert first == ColdStart(3, False)
    assert memory.num_evicted == 0
    missing = make_memory(without(spread_plan(3, 8, 4), 7), room=5)
    last_used_s_C = np.arange(24.0)
    (found,) = missing.host_cold(np.array([7]), last_used_s_C, 30.0)
    assert missing.num_evicted == 1
    gone = np.setdiff1d(np.arange(24), np.flatnonzero(missing.serving.has_C)).tolist()
    assert gone == [2 * found.worker]  # the earliest used of the worker's functions
