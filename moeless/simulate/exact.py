"""A recommended plan improved by integer programmes: `moeless plan --exact`.

Shapes: L MoE layers.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import hops_L, workers_touched_L
from moeless.planning.affinity.offline import ProgrammeConfig, min_hops_plan, min_workers_plan
from moeless.planning.affinity.online import AffinityConfig
from moeless.planning.affinity.programme import SolverLimits
from moeless.planning.affinity.statistics import AffinityStatistics
from moeless.simulate.scenario import Scenario, Topology

MAX_IMBALANCE = 1.05
"""Busiest worker over perfect balance that the programmes keep to, or that of the plan where it is worse."""


class ExactPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the integer programmes."""

    objective: Literal["workers", "hops"]
    """workers: those that a token touches in a layer, of a hub's systems. hops: share of a token's pairs of experts in
    consecutive layers that lie on different workers, of all-to-all systems."""
    before: float
    """Mean over layers, of the planner's own plan."""
    after: float
    gap: float
    """The plan is proved to lie at most this share above the optimum, in the worst layer; for hops, given the layer's
    neighbours."""
    layers: int
    """Layers that were solved. For workers, those with one instance of every function: others stay as they are."""


def placed_exactly(
    plan: Plan,
    statistics: AffinityStatistics,
    load_LE: FloatArray,
    scenario: Scenario,
    *,
    topology: Topology,
    time_limit_s: float,
) -> tuple[Plan, ExactPlacement]:
    """Move instances of the plan to where tokens go anyway, as far as integer programmes can prove; its counts stay.

    Args:
        load_LE: tokens that the plan is for.
        time_limit_s: of the solver, for a layer.
    Raises: ConfigError if the plan has no instance of a function that gets tokens.
    """
    objective: Literal["workers", "hops"] = "workers" if topology == "hub" else "hops"
    measure_L = workers_touched_L if objective == "workers" else hops_L
    before = float(np.mean(measure_L(plan, statistics)))
    affinity = AffinityConfig(objective=objective, max_imbalance=MAX_IMBALANCE)
    config = ProgrammeConfig(limits=SolverLimits(time_limit_s=time_limit_s))
    cluster, model = scenario.cluster, scenario.profile.model
    if objective == "workers":
        solvable_L = (plan.counts_LE == 1).all(axis=1)
        found = min_workers_plan(
            plan, statistics, load_LE, cluster, model, affinity=affinity, config=config, keeps_replicated=True
        )
    else:
        solvable_L = np.ones(plan.num_layers, dtype=np.bool_)
        found = min_hops_plan(plan, statistics, load_LE, cluster, model, affinity=affinity, config=config)
    after = float(np.mean(measure_L(found.plan, statistics)))
    return found.plan, ExactPlacement(
        objective=objective, before=before, after=after, gap=found.gap, layers=int(solvable_L.sum())
    )
