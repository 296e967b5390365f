"""Invariants of every tick, whatever the policy, the cluster and the loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.plan import Plan
from moeless.planning.baselines.paper import PaperPlanner
from moeless.planning.observation import Observation, Planner
from moeless.planning.planner import PlanningContext, hosted_instances
from tests.support.planners import moeless, observed, system
from tests.support.planning import assert_whole, cluster_of, clusters

Walk = tuple[PlanningContext, list[FloatArray], list[FloatArray], np.random.Generator]


def with_floor(tokens: FloatArray) -> FloatArray:
    """Time of calls, of which small ones take no less."""
    seconds: FloatArray = np.maximum(tokens, 1.0) * (tokens > 0)
    return seconds


@st.composite
def walks(draw: st.DrawFn, *, is_tight: bool = False) -> Walk:
    """A system, with plenty of memory or too little, and loads and upper loads for some ticks."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    whole = num_layers * num_experts
    if is_tight:  # equal workers, on which whatever is no more than their memory together finds room
        cluster = cluster_of([draw(st.integers(1, whole))] * draw(st.integers(1, 4)))
    else:
        cluster = draw(clusters(min_memory=whole, max_memory=2 * whole))
    planned = system(
        num_layers,
        num_experts,
        cluster,
        start_s=draw(st.sampled_from([0.0, 3.0])),
        seconds=draw(st.sampled_from([None, with_floor])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_layers, num_experts)
    steady = rng.lognormal(0.0, 1.5, shape)
    loads: list[FloatArray] = []
    uppers: list[FloatArray] = []
    for _ in range(draw(st.integers(2, 5))):
        load_LE = steady * rng.lognormal(0.0, draw(st.sampled_from([0.0, 1.0])), shape)
        load_LE *= rng.random(shape) < draw(st.sampled_from([0.3, 1.0]))
        loads.append(load_LE)
        uppers.append(load_LE * rng.uniform(1.0, 1.5))
    return planned, loads, uppers, rng


settings_of_policies = st.fixed_dictionaries(
    {
        "minReplicas": st.sampled_from([1, 2]),
        "maxReplicas": st.sampled_from([2, 3, 99]),
        "scaleToZero": st.booleans(),
        "keepAliveSeconds": st.sampled_from([0, 2]),
        "scaleUpStabilizationSeconds": st.sampled_from([0, 2]),
        "scaleDownStabilizationSeconds": st.sampled_from([0, 2]),
        "scaler": st.sampled_from([{"name": "cv"}, {"name": "minMax"}, {"name": "benefit"}]),
        "placer": st.sampled_from([{"name": "localityFirst"}, {"name": "minimalMoves", "maxImbalance": 1.0}]),
        "maxMovesPerTick": st.sampled_from([0, 1, 3, 99]),
        "benefitThreshold": st.sampled_from([0.0, 0.02, 0.2]),
    }
)


def walked(
    planner: Planner,
    planned: PlanningContext,
    loads: Sequence[FloatArray],
    uppers: Sequence[FloatArray],
    rng: np.random.Generator,
) -> Iterator[tuple[Observation, Plan | None, Plan]]:
    """Each tick's observation, the plan before and the plan after; some of what a plan started is still loading."""
    shape = loads[0].shape
    used_s_LE = np.full(shape, -np.inf)
    before: Plan | None = None
    pending: IntArray = np.empty(0, dtype=np.int64)
    for tick, (load_LE, upper_LE) in enumerate(zip(loads, uppers, strict=True)):
        used_s_LE = np.where(load_LE > 0, float(tick), used_s_LE)
        observation = Observation(
            time_s=float(tick),
            mean_LE=load_LE,
            upper_LE=upper_LE,
            window_LE=load_LE,
            last_used_s_LE=used_s_LE,
            num_steps=tick,
            pending_keys=pending,
        )
        after = planner.plan(observation, before)
        yield observation, before, after
        started = after.keys_N if before is None else np.setdiff1d(after.keys_N, before.keys_N)
        pending = started[rng.random(len(started)) < 0.5]
        before = after


def hosted_by(observation: Observation, before: Plan | None, num_workers: int) -> Plan | None:
    return hosted_instances(before, observation.pending_keys, (*observation.mean_LE.shape, num_workers))


@settings(max_examples=60, deadline=None)
@given(walks(), settings_of_policies)
def test_every_needed_function_has_its_least_and_none_more_than_its_most(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, *_ = walk
    num_workers = planned.cluster.num_workers
    for observation, _, plan in walked(moeless(planned, **chosen), *walk):
        assert_whole(plan, planned.cluster, planned.model)
        counts_LE = plan.counts_LE
        most = min(chosen["maxReplicas"], num_workers)
        assert (counts_LE <= most).all()
        is_needed_LE = (observation.mean_LE > 0) | (not chosen["scaleToZero"])
        assert (counts_LE[is_needed_LE | (counts_LE > 0)] >= min(chosen["minReplicas"], most)).all()


@settings(max_examples=80, deadline=None)
@given(st.booleans().flatmap(lambda is_tight: walks(is_tight=is_tight)), settings_of_policies, st.data())
def test_no_worker_has_more_than_its_memory_nor_a_layer_or_the_model_than_its_budget(
    walk: Walk, chosen: dict[str, Any], data: st.DataObject
) -> None:
    planned, *_ = walk
    layer_budget, budget = data.draw(st.sampled_from([(99, 99), (3, 99), (99, 6), (0, 6), (4, 0), (5, 7)]))
    chosen = {**chosen, "scaleToZero": True, "layerMemoryBudget": layer_budget, "memoryBudget": budget}
    for _, _, plan in walked(moeless(planned, **chosen), *walk):
        assert_whole(plan, planned.cluster, planned.model)
        assert (plan.counts_LE.sum(axis=1) <= layer_budget).all()
        assert plan.num_instances <= budget


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), settings_of_policies)
def test_no_tick_starts_more_than_is_missing_and_allowed(
    data: st.DataObject, is_tight: bool, chosen: dict[str, Any]
) -> None:
    walk = data.draw(walks(is_tight=is_tight))
    planned, *_ = walk
    num_workers = planned.cluster.num_workers
    least = min(chosen["minReplicas"], chosen["maxReplicas"], num_workers)
    for observation, before, plan in walked(moeless(planned, **chosen), *walk):
        hosted = hosted_by(observation, before, num_workers)
        if hosted is None:
            continue
        # At most: what is kept alive need not have its least, but may.
        missing_LE = np.maximum(least - hosted.counts_LE, 0) * (plan.counts_LE > 0)
        if is_tight and missing_LE.any():
            continue  # room for what must be is made by moving as many as it takes
        assert len(plan.started_since(hosted)) <= missing_LE.sum() + chosen["maxMovesPerTick"]


@settings(max_examples=60, deadline=None)
@given(walks(), settings_of_policies)
def test_versions_rise_where_something_changes_and_only_there(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, *_ = walk
    planner = moeless(planned, **chosen)
    for observation, before, plan in walked(planner, *walk):
        if before is None:
            assert plan.version == 1
        elif plan is not before:
            assert plan.version == before.version + 1
            assert not (np.array_equal(plan.keys_N, before.keys_N) and np.array_equal(plan.share_N, before.share_N))
        assert planner.plan(observation, plan) is plan


@settings(max_examples=60, deadline=None)
@given(walks(), settings_of_policies)
def test_the_same_walk_leads_to_the_same_plans(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, loads, uppers, rng = walk
    seed = int(rng.integers(2**32))
    ways = [
        list(walked(moeless(planned, **chosen), planned, loads, uppers, np.random.default_rng(seed))) for _ in range(2)
    ]
    for (_, _, one), (_, _, other) in zip(*ways, strict=True):
        np.testing.assert_array_equal(one.keys_N, other.keys_N)
        np.testing.assert_array_equal(one.share_N, other.share_N)


@settings(max_examples=60, deadline=None)
@given(walks(), settings_of_policies)
def test_a_layer_that_must_not_change_does_so_only_for_the_threshold(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, loads, uppers, rng = walk
    # All functions are always in use, and replicas stay: no layer must change.
    chosen = {**chosen, "minReplicas": 1, "scaleDownStabilizationSeconds": 1e9}
    loads, uppers = [load + 0.01 for load in loads], [upper + 0.02 for upper in uppers]
    for observation, before, plan in walked(moeless(planned, **chosen), planned, loads, uppers, rng):
        hosted = hosted_by(observation, before, planned.cluster.num_workers)
        if hosted is None:
            continue
        is_same_L = np.array([_is_same(hosted, plan, layer) for layer in range(plan.num_layers)])
        before_L, after_L = (planned.layer_times_L(each, observation.mean_LE) for each in (hosted, plan))
        assert (is_same_L | (after_L < before_L * (1 - chosen["benefitThreshold"]))).all()


def _is_same(one: Plan, other: Plan, layer: int) -> bool:
    (is_one_N, is_other_N) = (one.layer_N == layer, other.layer_N == layer)
    return np.array_equal(one.keys_N[is_one_N], other.keys_N[is_other_N]) and np.array_equal(
        one.share_N[is_one_N], other.share_N[is_other_N]
    )


@settings(max_examples=60, deadline=None)
@given(walks(), settings_of_policies, st.integers(0, 2**32 - 1))
def test_the_order_of_layers_and_experts_does_not_matter(walk: Walk, chosen: dict[str, Any], seed: int) -> None:
    planned, (load_LE, *_), (upper_LE, *_), _ = walk
    # Where nothing moves and no load or time is as high as another, there are no ties.
    planned = replace(planned, seconds=None)
    chosen = {**chosen, "placer": {"name": "localityFirst"}}
    rng = np.random.default_rng(seed)
    layers, experts = rng.permutation(planned.model.num_layers), rng.permutation(planned.model.num_experts)
    plan = moeless(planned, **chosen).plan(observed(load_LE, upper=upper_LE), None)
    other = moeless(planned, **chosen).plan(
        observed(load_LE[layers][:, experts], upper=upper_LE[layers][:, experts]), None
    )
    np.testing.assert_array_equal(other.counts_LE, plan.counts_LE[layers][:, experts])
    np.testing.assert_allclose(other.dense()[1], plan.dense()[1][layers][:, experts], atol=1e-9)


papers = st.fixed_dictionaries(
    {
        "max_cv": st.sampled_from([0.0, 0.2, 1.0]),
        "keep_alive_s": st.sampled_from([0.0, 2.0]),
        "layer_budget": st.none() | st.integers(0, 12),
    }
)


@settings(max_examples=60, deadline=None)
@given(walks(is_tight=True), papers)
def test_the_papers_plans_are_whole_within_budget_and_shared_evenly(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, *_ = walk
    num_layers, num_experts = planned.model.num_layers, planned.model.num_experts
    budget = planned.capacity // num_layers if chosen["layer_budget"] is None else chosen["layer_budget"]
    for observation, _, plan in walked(PaperPlanner(planned, **chosen), *walk):
        assert_whole(plan, planned.cluster, planned.model)
        counts_LE = plan.counts_LE
        assert (counts_LE.sum(axis=1) <= budget).all()
        if num_experts <= min(budget, planned.capacity // num_layers):
            assert (counts_LE[observation.mean_LE > 0] > 0).all()
        np.testing.assert_allclose(plan.share_N, 1 / counts_LE[plan.layer_N, plan.expert_N])


@settings(max_examples=60, deadline=None)
@given(walks(), papers)
def test_the_papers_warm_instances_never_move(walk: Walk, chosen: dict[str, Any]) -> None:
    planned, *_ = walk
    for observation, before, plan in walked(PaperPlanner(planned, **chosen), *walk):
        hosted = hosted_by(observation, before, planned.cluster.num_workers)
        if hosted is not None:
            missing = np.maximum(plan.counts_LE - hosted.counts_LE, 0).sum()
            assert len(plan.started_since(hosted)) == missing
        if before is not None and plan is not before:
            assert plan.version == before.version + 1


@pytest.mark.parametrize("seed", range(10))
def test_layers_that_change_alone_do_not_overfill_a_worker_that_others_were_to_leave(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        num_layers, num_experts, num_workers = (int(n) for n in rng.integers((2, 4, 2), (5, 9, 5)))
        room = int(np.ceil(rng.uniform(1.0, 1.6) * num_layers * num_experts / num_workers))
        planned = system(num_layers, num_experts, cluster_of([room] * num_workers))
        planner = moeless(planned, placer={"name": "minimalMoves", "maxImbalance": 1.0}, maxMovesPerTick=99)
        loads = [rng.lognormal(0.0, 1.2, (num_layers, num_experts)) for _ in range(5)]
        for _, _, plan in walked(planner, planned, loads, loads, rng):
            assert_whole(plan, planned.cluster, planned.model)
