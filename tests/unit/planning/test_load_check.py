from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.planning.affinity.online import place_by_affinity
from moeless.planning.affinity.statistics import gather_statistics
from moeless.planning.baselines.eplb import EplbPlanner, eplb_global, eplb_hierarchical
from moeless.planning.baselines.paper import PaperPlanner
from moeless.planning.baselines.static import StaticPlanner, random_placement, round_robin, static_expert_parallelism
from moeless.planning.first_plan import make_first_plan
from moeless.planning.load_check import check_load
from moeless.planning.observation import Planner
from moeless.planning.place import exact_shares, min_max_shares, place
from moeless.planning.scale import Limits, replicas_by_benefit, replicas_by_cv, replicas_min_max
from tests.support.planners import moeless, observed, system
from tests.support.planning import cluster_of, model_of, plan_of

CLUSTER, MODEL = cluster_of([4, 4]), model_of(1, 2)
ONES = np.ones((1, 2), dtype=np.int64)
PLAN = plan_of(2, [{0: 1.0}, {1: 1.0}])
LIMITS = Limits(min_LE=ONES, max_LE=2 * ONES, budget_L=np.array([4]))

PLANNERS: dict[str, Callable[[], Planner]] = {
    "moeless": lambda: moeless(system(1, 2, CLUSTER)),
    "paper": lambda: PaperPlanner(system(1, 2, CLUSTER)),
    "static": lambda: StaticPlanner(cluster=CLUSTER, model=MODEL),
    "eplb": lambda: EplbPlanner(cluster=CLUSTER, model=MODEL),
}
FUNCTIONS: dict[str, Callable[[FloatArray], Any]] = {
    "place": lambda load_LE: place(ONES, load_LE, CLUSTER, MODEL),
    "static": lambda load_LE: static_expert_parallelism(ONES, load_LE, CLUSTER, MODEL),
    "round robin": lambda load_LE: round_robin(ONES, load_LE, CLUSTER, MODEL),
    "random": lambda load_LE: random_placement(ONES, load_LE, CLUSTER, MODEL),
    "eplb": lambda load_LE: eplb_global(ONES, load_LE, CLUSTER, MODEL),
    "eplb hierarchical": lambda load_LE: eplb_hierarchical(ONES, load_LE, CLUSTER, MODEL, num_groups=2),
    "cv": lambda load_LE: replicas_by_cv(load_LE, LIMITS, max_cv_L=np.array([0.1])),
    "min max": lambda load_LE: replicas_min_max(load_LE, LIMITS),
    "benefit": lambda load_LE: replicas_by_benefit(load_LE, LIMITS, num_extras=2, num_workers=2),
    "shares": lambda load_LE: min_max_shares(PLAN.layer_N, PLAN.expert_N, PLAN.worker_N, load_LE, CLUSTER.speed_W),
    "exact shares": lambda load_LE: exact_shares(PLAN, load_LE, CLUSTER.speed_W),
    "affinity": lambda load_LE: place_by_affinity(
        PLAN, gather_statistics(np.array([[[0]], [[1]]]), num_experts=2), load_LE, CLUSTER, MODEL
    ),
}
BAD = [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (-1.5, "-1.5")]


@pytest.mark.parametrize(("value", "shown"), BAD)
@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("field", ["load", "upper"])
def test_a_planner_refuses_a_load_that_is_no_load(name: str, field: str, value: float, shown: str) -> None:
    PLANNERS[name]().plan(observed([[3.0, 1.0]]), None)  # a load that is one is planned for
    wrong = [[3.0, value]]
    with pytest.raises(ConfigError, match=rf"^observation.*got {shown} for expert 1 of layer 0"):
        PLANNERS[name]().plan(
            observed(wrong, used_s=[[0.0, 0.0]]) if field == "load" else observed([[3.0, 1.0]], upper=wrong), None
        )


@pytest.mark.parametrize(("value", "shown"), BAD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_that_plans_refuses_it_too(name: str, value: float, shown: str) -> None:
    FUNCTIONS[name](np.array([[3.0, 1.0]]))
    with pytest.raises(ConfigError, match=rf"must be finite and >= 0, got {shown} for expert 1 of layer 0"):
        FUNCTIONS[name](np.array([[3.0, value]]))


@pytest.mark.parametrize(("value", "shown"), BAD)
def test_the_first_plan_refuses_it_by_its_own_name(value: float, shown: str) -> None:
    planner = PLANNERS["static"]()
    make_first_plan(planner, MODEL, step_tokens=8, prior_LE=np.array([[0.5, 0.5]]))
    with pytest.raises(ConfigError, match=f"^prior_LE must be finite and >= 0, got {shown} for expert 0 of layer 0"):
        make_first_plan(planner, MODEL, step_tokens=8, prior_LE=np.array([[value, 0.5]]))


def test_the_first_wrong_value_is_named_with_its_layer_and_expert() -> None:
    load_LE = np.zeros((3, 4))
    load_LE[1, 2], load_LE[2, 0] = -1, np.nan
    with pytest.raises(ConfigError, match="^given must be finite and >= 0, got -1 for expert 2 of layer 1$"):
        check_load("given", load_LE, (3, 4))


def test_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"of \(3, 4\) layers and experts, got \(4, 3\)"):
        check_load("given", np.zeros((4, 3)), (3, 4))
