from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.cluster import even_cluster
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan


def _plan(rows: list[tuple[int, int, int, float]], **shape: int) -> Plan:
    layer, expert, worker, share = (np.array(column) for column in zip(*rows, strict=True))
    return Plan.from_instances(
        **{"version": 1, "num_layers": 2, "num_experts": 3, "num_workers": 2, **shape},
        layer_N=layer.astype(np.int64),
        expert_N=expert.astype(np.int64),
        worker_N=worker.astype(np.int64),
        share_N=share.astype(np.float64),
    )


def _empty() -> Plan:
    none = np.empty(0, dtype=np.int64)
    return Plan.from_instances(
        version=1, num_layers=2, num_experts=3, num_workers=2, layer_N=none, expert_N=none, worker_N=none, share_N=none
    )


def test_a_workers_load_is_its_share_of_its_functions() -> None:
    plan = _plan([(0, 0, 0, 0.25), (0, 0, 1, 0.75), (0, 1, 1, 1.0), (1, 2, 0, 1.0)])
    load_LE = np.array([[8.0, 10.0, 0.0], [0.0, 0.0, 5.0]])
    assert plan.worker_load_LW(load_LE).tolist() == [[2.0, 16.0], [5.0, 0.0]]
    assert plan.counts_LE.tolist() == [[2, 1, 0], [0, 0, 1]]


def test_an_instance_without_a_share_is_not_in_the_routing_table() -> None:
    plan = _plan([(0, 0, 0, 1.0), (0, 0, 1, 0.0)])
    table = plan.to_routing_table(["a", "b"])
    assert [instance.worker for instance in table.instances[FunctionId(0, 0)]] == ["a"]


def test_what_was_started_is_what_the_plan_before_did_not_have() -> None:
    before = _plan([(0, 0, 0, 1.0), (0, 1, 1, 1.0)])
    after = _plan([(0, 0, 0, 0.5), (0, 0, 1, 0.5), (1, 1, 1, 1.0)])
    started = after.started_since(before)
    assert [(int(after.layer_N[i]), int(after.worker_N[i])) for i in started] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 0, 0.5), (0, 0, 1, 0.4)], "shares of L00.E000 must sum to 1, got 0.9"),
        ([(0, 0, 0, 0.5), (0, 0, 0, 0.5)], "L00.E000 must be on a worker once, got worker 0 twice"),
        ([(0, 3, 0, 1.0)], "expert must be from 0 to 2, got 3 to 3"),
        ([(0, 0, 0, 1.5), (0, 0, 1, -0.5)], "shares must be finite and >= 0, got -0.5"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(rows: list[tuple[int, int, int, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(rows)


@given(st.integers(0, 2**32 - 1))
def test_dense_and_back_is_the_same_plan_and_keeps_all_tokens(seed: int) -> None:
    random = np.random.default_rng(seed)
    has_LEW = random.random((2, 4, 3)) < 0.6
    weights_LEW = np.where(has_LEW, random.random((2, 4, 3)) + 0.1, 0)
    shares_LEW = weights_LEW / np.maximum(weights_LEW.sum(axis=2, keepdims=True), 1e-9)
    plan = Plan.from_dense(has_LEW, shares_LEW, version=3)
    has_again_LEW, shares_again_LEW = plan.dense()
    assert (has_again_LEW == has_LEW).all()
    np.testing.assert_allclose(shares_again_LEW, shares_LEW)
    load_LE = np.where(has_LEW.any(axis=2), random.random((2, 4)), 0)
    np.testing.assert_allclose(plan.worker_load_LW(load_LE).sum(axis=1), load_LE.sum(axis=1))
    assert not len(plan.started_since(plan))


def test_a_copy_with_other_shares_or_version_knows_what_was_computed_of_the_instances() -> None:
    plan = _plan([(0, 0, 0, 0.5), (0, 0, 1, 0.5), (0, 1, 1, 1.0)])
    counts_LE = plan.counts_LE
    other = plan.with_shares(np.array([0.25, 0.75, 1.0])).with_version(7)
    assert other.counts_LE is counts_LE
    assert (other.version, other.share_N.tolist()) == (7, [0.25, 0.75, 1.0])
    assert (plan.version, plan.share_N.tolist()) == (1, [0.5, 0.5, 1.0])


def test_a_plan_knows_which_instances_it_has() -> None:
    plan = _plan([(0, 0, 0, 0.5), (0, 0, 1, 0.5), (0, 1, 1, 1.0)])
    every = np.arange(2 * 3 * 2)
    assert np.flatnonzero(plan.has(every)).tolist() == plan.keys_N.tolist()
    assert not _empty().has(every).any()
    assert plan.started_since(_empty()).tolist() == [0, 1, 2]


def test_loads_of_another_shape_are_refused() -> None:
    plan = _plan([(0, 0, 0, 1.0)])
    with pytest.raises(ConfigError, match="load_LE must be of the plan's .* layers and experts"):
        plan.worker_load_LW(np.ones((3, 4)))


@pytest.mark.parametrize(
    "name",
    ["layer_N", "expert_N", "worker_N", "share_N", "function_N", "keys_N", "layer_worker_N", "counts_LE", "hosted_LW"],
)
def test_a_plans_arrays_are_read_only(name: str) -> None:
    plan = Plan.from_dense(np.ones((1, 2, 2), dtype=bool), np.full((1, 2, 2), 0.5), version=1)
    for same in (plan, plan.with_version(2), plan.with_shares(np.full(4, 0.5))):
        with pytest.raises(ValueError, match="read-only"):
            getattr(same, name)[...] = 0


@pytest.mark.parametrize("name", ["speed_W", "node_W"])
def test_a_clusters_arrays_are_read_only(name: str) -> None:
    with pytest.raises(ValueError, match="read-only"):
        getattr(even_cluster(2, memory_bytes=1), name)[...] = 0
