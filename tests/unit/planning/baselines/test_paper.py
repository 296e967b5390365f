from __future__ import annotations

from typing import Any

import pytest

from moeless.core.errors import ConfigError
from moeless.planning.baselines.paper import PaperPlanner
from moeless.planning.planner import PlanningContext
from tests.support.planners import observed, system, ticks
from tests.support.planning import cluster_of, counts_of, plan_of, workers_of


def paper(planned: PlanningContext, **changed: Any) -> PaperPlanner:
    return PaperPlanner(planned, **changed)


def test_the_papers_planner_spreads_hot_functions_until_loads_vary_little() -> None:
    load = [[40.0, 10.0, 10.0, 0.0]]
    assert counts_of(paper(system(1, 4, cluster_of([9] * 4))).plan(observed(load), None)) == [[3, 1, 1, 0]]
    assert counts_of(paper(system(1, 4, cluster_of([9] * 4)), max_cv=1.0).plan(observed(load), None)) == [[1, 1, 1, 0]]


def test_the_papers_planner_splits_tokens_evenly_over_replicas() -> None:
    plan = paper(system(1, 2, cluster_of([9, 9], speeds=[1.0, 3.0]))).plan(observed([[30.0, 10.0]]), None)
    assert plan.share_N.tolist() == [0.5, 0.5, 1.0]


def test_the_papers_planner_leaves_warm_instances_where_they_are() -> None:
    before = plan_of(2, [{0: 1.0}, {0: 1.0}, {}], version=5)
    plan = paper(system(1, 3, cluster_of([9, 9])), max_cv=9.0).plan(observed([[6.0, 4.0, 2.0]]), before)
    assert workers_of(plan) == {(0, 0): [0], (0, 1): [0], (0, 2): [1]}
    assert plan.version == 6


def test_the_papers_planner_keeps_instances_for_the_keep_alive() -> None:
    planner = paper(system(1, 2, cluster_of([9, 9])), keep_alive_s=3.0)
    plans = ticks(planner, [[[10.0, 10.0]], *[[[10.0, 0.0]]] * 4])
    assert [counts_of(plan)[0][1] for plan in plans] == [1, 1, 1, 0, 0]
    assert plans[1] is plans[0]


def test_the_papers_planner_keeps_within_a_layers_budget() -> None:
    planned = system(2, 3, cluster_of([9, 9]))
    plan = paper(planned, layer_budget=2).plan(observed([[3.0, 1.0, 2.0], [9.0, 1.0, 0.0]]), None)
    assert counts_of(plan) == [[1, 0, 1], [1, 1, 0]]


def test_the_papers_layers_have_the_same_part_of_the_workers_memory() -> None:
    plan = paper(system(2, 3, cluster_of([3, 2])), max_cv=0.0).plan(observed([[3.0, 1.0, 2.0], [9.0, 0.0, 0.0]]), None)
    assert counts_of(plan) == [[1, 0, 1], [1, 0, 0]]


def test_the_papers_planner_does_not_start_again_what_is_being_loaded() -> None:
    plan = paper(system(1, 2, cluster_of([9, 9, 9]))).plan(
        observed([[5.0, 5.0]], pending=[1 * 3 + 2]), plan_of(3, [{0: 1.0}, {}])
    )
    assert workers_of(plan) == {(0, 0): [0], (0, 1): [2]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_cv": -0.1}, "max_cv must be at least 0, got -0.1"),
        ({"max_cv": float("nan")}, "max_cv must be at least 0, got nan"),
        ({"keep_alive_s": -1.0}, "keep_alive_s must be at least 0, got -1.0"),
        ({"layer_budget": -1}, "layer_budget must be at least 0, got -1"),
    ],
)
def test_the_papers_settings_that_cannot_be_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paper(system(1, 2, cluster_of([9])), **changed)
