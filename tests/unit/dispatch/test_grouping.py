"""Grouping of pairs by worker: every pair once, by share, in worker order, never on a dead worker."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeless.core.arrays import Float64Array
from moeless.core.call_cost import CallCost
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, InstanceShare, RoutingTable
from moeless.dispatch.grouping import WorkerGroup, compile_layer, group_by_worker, regroup_elsewhere

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORKERS = ("engine", "worker-0", "worker-1", "worker-2", "worker-3")
LAYER = 3


@dataclass(frozen=True)
class Case:
    table: RoutingTable
    num_experts: int
    experts_Tk: npt.NDArray[np.int64]
    step: int

    def holders(self, expert: int, known: frozenset[str] = frozenset(WORKERS)) -> set[str]:
        """Workers that may get pairs of `expert`."""
        shares = self.table.instances.get(FunctionId(LAYER, expert), ())
        return {share.worker for share in shares if share.worker in known} or {LOCAL_WORKER}

    def inputs_and_output(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Hidden states of size 1, gate weights, and the layer's output where expert e turns x into (e + 1) x."""
        rng = np.random.default_rng(0)
        x_T, weights_Tk = rng.random(len(self.experts_Tk)), rng.random(self.experts_Tk.shape)
        return x_T, weights_Tk, (weights_Tk * (self.experts_Tk + 1) * x_T[:, None]).sum(1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 9))
    instances = {}
    for expert in range(num_experts):
        holders = draw(st.lists(st.sampled_from(WORKERS), unique=True, max_size=4))
        weights = np.array(draw(st.lists(st.integers(1, 9), min_size=len(holders), max_size=len(holders))))
        if holders:
            shares = [InstanceShare(w, float(s)) for w, s in zip(holders, weights / weights.sum(), strict=True)]
            instances[FunctionId(LAYER, expert)] = tuple(shares)
    num_tokens, top_k = draw(st.integers(1, 12)), draw(st.integers(1, num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts_Tk = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    return Case(RoutingTable(version=1, instances=instances), num_experts, experts_Tk, draw(st.integers(0, 10**6)))


def assert_consistent(group: WorkerGroup, experts_Tk: npt.NDArray[np.int64]) -> None:
    """What a worker gets describes the pairs that it names."""
    top_k = experts_Tk.shape[1]
    assert group.experts_n.tolist() == experts_Tk.reshape(-1)[group.pairs_n].tolist()
    assert (np.diff(group.experts_n) >= 0).all()
    assert (np.diff(group.tokens_R) > 0).all()
    assert group.tokens_R[group.rows_n].tolist() == (group.pairs_n // top_k).tolist()
    assert set(group.rows_n.tolist()) == set(range(len(group.tokens_R)))


def weighted_sums(group: WorkerGroup, x_T: Float64Array, weights_Tk: Float64Array) -> Float64Array:
    """A worker's answer."""
    out_R = np.zeros(len(group.tokens_R))
    y_n = (group.experts_n + 1) * x_T[group.tokens_R][group.rows_n]
    np.add.at(out_R, group.rows_n, weights_Tk.reshape(-1)[group.pairs_n] * y_n)
    return out_R


@unhurried
@given(case=cases())
def test_every_pair_goes_to_exactly_one_instance_of_its_function(case: Case) -> None:
    compiled = compile_layer(case.table, LAYER, case.num_experts)
    groups = group_by_worker(compiled, case.experts_Tk, step=case.step)
    pairs = [pair for group in groups for pair in group.pairs_n.tolist()]
    assert sorted(pairs) == list(range(case.experts_Tk.size))
    for group in groups:
        assert_consistent(group, case.experts_Tk)
        for expert in group.experts_n.tolist():
            assert compiled.workers[group.worker] in case.holders(expert)


@unhurried
@given(case=cases())
def test_groups_come_in_the_order_of_worker_names(case: Case) -> None:
    compiled = compile_layer(case.table, LAYER, case.num_experts)
    names = [compiled.workers[group.worker] for group in group_by_worker(compiled, case.experts_Tk, step=case.step)]
    assert names == sorted(set(names))


@unhurried
@given(case=cases())
def test_the_workers_sums_add_up_to_the_layers_output(case: Case) -> None:
    x_T, weights_Tk, dense_T = case.inputs_and_output()
    out_T = np.zeros_like(dense_T)
    for group in group_by_worker(compile_layer(case.table, LAYER, case.num_experts), case.experts_Tk, step=case.step):
        out_T[group.tokens_R] += weighted_sums(group, x_T, weights_Tk)
    np.testing.assert_allclose(out_T, dense_T, rtol=1e-12)


@unhurried
@given(case=cases(), known=st.frozensets(st.sampled_from(WORKERS)))
def test_a_worker_that_cannot_be_reached_gets_nothing(case: Case, known: frozenset[str]) -> None:
    known |= {LOCAL_WORKER}
    compiled = compile_layer(case.table, LAYER, case.num_experts, known=known)
    assert set(compiled.workers) <= known
    for group in group_by_worker(compiled, case.experts_Tk, step=case.step):
        for expert in group.experts_n.tolist():
            assert compiled.workers[group.worker] in case.holders(expert, known)


@unhurried
@given(case=cases())
def test_the_same_call_is_grouped_the_same_way(case: Case) -> None:
    compiled = compile_layer(case.table, LAYER, case.num_experts)
    first, second = (group_by_worker(compiled, case.experts_Tk, step=case.step) for _ in range(2))
    assert [(g.worker, g.pairs_n.tolist()) for g in first] == [(g.worker, g.pairs_n.tolist()) for g in second]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.6, 0.3, 0.1)])
def test_replicas_get_their_shares_in_the_long_run(num_tokens: int, shares: tuple[float, ...]) -> None:
    replicas = tuple(InstanceShare(f"worker-{number}", share) for number, share in enumerate(shares))
    table = RoutingTable(version=1, instances={FunctionId(LAYER, 0): replicas})
    compiled = compile_layer(table, LAYER, 1)
    experts_Tk = np.zeros((num_tokens, 1), dtype=np.int64)
    served = np.zeros(len(shares))
    num_steps = 500
    for step in range(num_steps):
        for group in group_by_worker(compiled, experts_Tk, step=step):
            served[group.worker] += len(group.pairs_n)
    np.testing.assert_allclose(served / (num_steps * num_tokens), shares, atol=0.01)


@unhurried
@given(case=cases(), floor=st.sampled_from([0.0, 4.0, 100.0]))
def test_a_step_is_evened_out_among_the_instances_that_there_are(case: Case, floor: float) -> None:
    cost = CallCost(call_tokens=1.0, floor_tokens=floor)
    table = replace(case.table, step_cost=cost)
    groups = group_by_worker(compile_layer(table, LAYER, case.num_experts), case.experts_Tk, step=case.step)
    pairs = [pair for group in groups for pair in group.pairs_n.tolist()]
    assert sorted(pairs) == list(range(case.experts_Tk.size))
    workers = compile_layer(table, LAYER, case.num_experts).workers
    for group in groups:
        assert_consistent(group, case.experts_Tk)
        for expert in group.experts_n.tolist():
            assert workers[group.worker] in case.holders(expert)


def test_a_hot_expert_leaves_the_worker_that_others_keep_busy() -> None:
    instances = {
        FunctionId(LAYER, 0): (InstanceShare("worker-0", 1.0), InstanceShare("worker-1", 0.0)),
        FunctionId(LAYER, 1): (InstanceShare("worker-0"),),
    }
    table = RoutingTable(version=1, instances=instances, step_cost=CallCost())
    experts_Tk = np.array([[0]] * 30 + [[1]] * 30, dtype=np.int64)
    groups = group_by_worker(compile_layer(table, LAYER, 2), experts_Tk, step=0)
    assert [len(group.pairs_n) for group in groups] == [30, 30]
    by_shares = group_by_worker(
        compile_layer(RoutingTable(version=1, instances={f: i[:1] for f, i in instances.items()}), LAYER, 2),
        experts_Tk,
        step=0,
    )
    assert [len(group.pairs_n) for group in by_shares] == [60]


def test_reachable_replicas_without_a_share_get_equal_ones() -> None:
    # The worker that had all tokens is away.
    shares = (InstanceShare("worker-0", 1.0), InstanceShare("worker-1", 0.0), InstanceShare("worker-2", 0.0))
    table = RoutingTable(version=1, instances={FunctionId(LAYER, 0): shares}, step_cost=CallCost(floor_tokens=1.0))
    compiled = compile_layer(table, LAYER, 1, known=frozenset({"worker-1", "worker-2"}))
    assert compiled.replicas_F is not None
    assert compiled.replicas_F.share_N.tolist() == [0.5, 0.5]
    groups = group_by_worker(compiled, np.zeros((30, 1), dtype=np.int64), step=0)
    assert [(compiled.workers[group.worker], len(group.pairs_n)) for group in groups] == [
        ("worker-1", 15),
        ("worker-2", 15),
    ]


def test_an_instance_without_a_share_needs_a_step_cost() -> None:
    instances = {FunctionId(0, 0): (InstanceShare("a", 1.0), InstanceShare("b", 0.0))}
    assert RoutingTable(version=1, instances=instances, step_cost=CallCost()).workers == ("a", "b")
    with pytest.raises(ConfigError, match="must be > 0 and sum to 1"):
        RoutingTable(version=1, instances=instances)


@unhurried
@given(case=cases(), data=st.data())
def test_a_failed_workers_pairs_go_to_living_replicas_or_are_left_over(case: Case, data: st.DataObject) -> None:
    compiled = compile_layer(case.table, LAYER, case.num_experts)
    groups = group_by_worker(compiled, case.experts_Tk, step=case.step)
    failed = data.draw(st.sampled_from(groups))
    dead = {failed.worker} | data.draw(st.sets(st.sampled_from(range(len(compiled.workers)))))
    others, left = regroup_elsewhere(compiled, failed, case.experts_Tk, dead=dead)
    for group in others:
        assert group.worker not in dead
        assert_consistent(group, case.experts_Tk)
        for expert in group.experts_n.tolist():
            assert compiled.workers[group.worker] in case.holders(expert)
    if left is not None:
        assert_consistent(left, case.experts_Tk)
        alive = {name for number, name in enumerate(compiled.workers) if number not in dead}
        assert not any(case.holders(expert) & alive for expert in left.experts_n.tolist())
    pairs = [pair for group in [*others, *([left] if left else [])] for pair in group.pairs_n.tolist()]
    assert sorted(pairs) == sorted(failed.pairs_n.tolist())


@unhurried
@given(case=cases(), data=st.data())
def test_sums_after_a_failure_add_up_to_the_layers_output(case: Case, data: st.DataObject) -> None:
    compiled = compile_layer(case.table, LAYER, case.num_experts)
    groups = group_by_worker(compiled, case.experts_Tk, step=case.step)
    failed = data.draw(st.sampled_from(groups))
    others, left = regroup_elsewhere(compiled, failed, case.experts_Tk, dead={failed.worker})
    x_T, weights_Tk, dense_T = case.inputs_and_output()
    out_T = np.zeros_like(dense_T)
    for group in [*(g for g in groups if g is not failed), *others, *([left] if left else [])]:
        out_T[group.tokens_R] += weighted_sums(group, x_T, weights_Tk)
    np.testing.assert_allclose(out_T, dense_T, rtol=1e-12)


def test_a_failed_workers_pairs_are_spread_over_all_living_replicas() -> None:
    instances = tuple(InstanceShare(f"worker-{number}", 0.25) for number in range(4))
    table = RoutingTable(version=1, instances={FunctionId(0, 0): instances})
    compiled = compile_layer(table, 0, 1)
    experts_Tk = np.zeros((40, 1), dtype=np.int64)
    failed = next(group for group in group_by_worker(compiled, experts_Tk, step=0) if group.worker == 0)
    groups, left = regroup_elsewhere(compiled, failed, experts_Tk, dead={0, 2})
    assert left is None
    assert [group.worker for group in groups] == [1, 3]
    assert [len(group.pairs_n) for group in groups] == [5, 5]


def test_reachable_instances_without_a_share_take_over_evenly() -> None:
    instances = (InstanceShare("gone", 1.0), InstanceShare("spare-0", 0.0), InstanceShare("spare-1", 0.0))
    table = RoutingTable(version=1, instances={FunctionId(0, 0): instances}, step_cost=CallCost())
    compiled = compile_layer(table, 0, 1, known=frozenset({"spare-0", "spare-1", LOCAL_WORKER}))
    assert compiled.replicas_F is not None
    assert compiled.replicas_F.share_N.tolist() == [0.5, 0.5]
    groups = group_by_worker(compiled, np.zeros((40, 1), dtype=np.int64), step=0)
    assert {compiled.workers[group.worker]: len(group.pairs_n) for group in groups} == {"spare-0": 20, "spare-1": 20}
