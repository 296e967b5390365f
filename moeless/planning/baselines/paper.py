"""The planner of the MoEless paper, as published.

Shapes: L MoE layers, E experts per layer, W workers.
"""

from __future__ import annotations

import numpy as np

from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.observation import Observation
from moeless.planning.place import PlacementConfig, equal_shares, place
from moeless.planning.planner import PlanningContext, are_same, hosted_instances
from moeless.planning.scale import Limits, Stabiliser, fit_budgets, fit_workers, replicas_by_cv


class PaperPlanner:
    """The system of the MoEless paper (arXiv 2603.06350) as far as its text describes it.

    Each time anew: one replica for every function with forecast tokens, more to the highest load per replica until
    the loads vary by at most V or the layer's budget is spent; warm instances stay, the others go heaviest first to
    the least busy worker with memory; a function's tokens are split evenly over its replicas. An instance that is no
    longer wanted is kept alive, and serves, until it was not wanted for the keep-alive.
    """

    name = "moeless-paper"

    def __init__(
        self,
        system: PlanningContext,
        *,
        max_cv: float = 0.2,
        keep_alive_s: float = 30.0,
        layer_budget: int | None = None,
    ) -> None:
        """Args: layer_budget: instances of a layer; by default the workers' memory divided by the layers."""
        if not max_cv >= 0:
            raise ConfigError(f"max_cv must be at least 0, got {max_cv}")
        if not keep_alive_s >= 0:
            raise ConfigError(f"keep_alive_s must be at least 0, got {keep_alive_s}")
        if layer_budget is not None and layer_budget < 0:
            raise ConfigError(f"layer_budget must be at least 0, got {layer_budget}")
        self._system = system
        self._max_cv = max_cv
        shape = (system.model.num_layers, system.model.num_experts)
        self._layer_budget = system.capacity // system.model.num_layers if layer_budget is None else layer_budget
        self._stabiliser = Stabiliser(
            up_window_s_LE=np.zeros(shape),
            down_window_s_LE=np.full(shape, keep_alive_s),
            ready_s=0.0,
            window_s=0.0,
        )

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """See `Planner.plan`."""
        system = self._system
        load_LE = observation.mean_LE
        shape = (*load_LE.shape, system.cluster.num_workers)
        hosted = hosted_instances(previous, observation.pending_keys, shape)
        current_LE = None if hosted is None else hosted.counts_LE
        budget_L = np.full(shape[0], self._layer_budget)
        # Where the budget has no room for all, the functions with the least load go without.
        used_LE = (load_LE > 0).astype(np.int64)
        none_LE = np.zeros_like(used_LE)
        first_LE = fit_budgets(
            used_LE,
            Limits(min_LE=none_LE, max_LE=used_LE, budget_L=budget_L),
            load_LE=load_LE,
            wanted_LE=used_LE,
            budget=system.capacity,
        )
        limits = Limits(min_LE=first_LE, max_LE=np.full_like(first_LE, shape[2]), budget_L=budget_L)
        wanted_LE = replicas_by_cv(
            np.where(first_LE > 0, load_LE, 0.0), limits, max_cv_L=np.full(shape[0], self._max_cv)
        )
        held_LE = self._stabiliser.stabilise(wanted_LE, time_s=observation.time_s, current_LE=current_LE)
        counts_LE = fit_budgets(
            np.maximum(held_LE, first_LE), limits, load_LE=load_LE, wanted_LE=wanted_LE, budget=system.capacity
        )
        counts_LE = fit_workers(counts_LE, load_LE, system.cluster.capacity_W(system.model))
        plan = place(
            counts_LE,
            load_LE,
            system.cluster,
            system.model,
            previous=hosted,
            config=PlacementConfig(max_moves=0),
        )
        plan = plan.with_shares(equal_shares(plan.function_N))
        if previous is not None and are_same(plan, previous):
            return previous
        return plan.with_version(1 if previous is None else previous.version + 1)
