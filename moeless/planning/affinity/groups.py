"""Fewest workers touched in a layer of equal workers, as a choice among all groups of experts that one may host.

The integer programme: choose at most W groups, each expert in exactly one, so that the sum of what the groups cost is
minimal; a group costs the tokens that choose any of its experts. Bounds on a worker's load and instances only leave
groups out. Its relaxation is far tighter than that of the programme with a variable for each set and worker
(affinity.programme), and workers that can be exchanged for one another do not multiply its solutions; but there are
many groups: E! / (s! (E − s)!) of s experts, so that it is for layers of a few dozen experts, or few to a worker.

Shapes: E experts, W workers, U distinct sets, G groups, P prefixes of groups in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csc_array

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import ExpertSets

_PREFIXES = 500
"""At a time; bounds memory at this × the number of distinct sets × 8 bytes."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Solved:
    """Placement of one layer that an integer programme found, and the bound that it proved."""

    worker_n: IntArray | None
    """Worker of each instance; None if no placement was found in time."""
    cost: float
    """Cost of that placement; infinite if there is none."""
    bound: float
    """No placement within the bounds costs less."""

    @property
    def gap(self) -> float:
        """Distance to the optimum at most, as a share of the optimum."""
        return 0.0 if self.cost <= self.bound else (self.cost - self.bound) / max(abs(self.bound), 1e-12)


def num_groups(num_experts: int, bounds: LayerBounds) -> int:
    """Number of groups that `min_workers_by_groups` would look at."""
    return sum(comb(num_experts, size) for size in group_sizes(num_experts, bounds))


def are_alike(bounds: LayerBounds) -> bool:
    """Return whether all workers have the same bounds and are thus interchangeable."""
    return bool(np.ptp(bounds.max_load_W) <= 1e-9 * bounds.max_load_W.max() and np.ptp(bounds.max_instances_W) == 0)


def min_workers_by_groups(
    sets: ExpertSets, bounds: LayerBounds, *, known_cost: float = np.inf, time_limit_s: float = 60.0, gap: float = 0.0
) -> Solved:
    """The optimal placement of a layer's experts, each once, on workers that are alike.

    Args:
        known_cost: of a placement that is known already: only better ones are looked for, which is far faster.
        gap: stop once what is found is proved to lie at most this share above the optimum.
    """
    groups_GE, cost_G = _groups(sets, bounds)
    if not len(cost_G):
        return Solved(worker_n=None, cost=np.inf, bound=known_cost)
    num_experts, num_workers = len(bounds.load_E), len(bounds.max_load_W)
    # A row for each expert, which must be hosted, and one for the workers.
    rows_RG = csc_array(np.vstack([groups_GE.T, np.ones(len(cost_G))]).astype(np.float64))
    relaxed = linprog(
        cost_G,
        A_eq=rows_RG[:num_experts],
        b_eq=np.ones(num_experts),
        A_ub=rows_RG[num_experts:],
        b_ub=[num_workers],
        method="highs",
    )
    if relaxed.status == 2:
        return Solved(worker_n=None, cost=np.inf, bound=known_cost)
    assert relaxed.success, relaxed.message
    price_R = np.append(relaxed.eqlin.marginals, relaxed.ineqlin.marginals)
    # A group that costs so much more than the prices of its experts is in no placement better than the known one.
    is_open_G = cost_G - rows_RG.T @ price_R <= known_cost - relaxed.fun + 1e-9
    if not is_open_G.any():
        return Solved(worker_n=None, cost=np.inf, bound=known_cost)
    max_R = np.append(np.ones(num_experts), num_workers)
    min_R = np.append(np.ones(num_experts), 0)
    result = milp(
        cost_G[is_open_G],
        integrality=np.ones(int(is_open_G.sum())),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows_RG[:, is_open_G], min_R, max_R),
        options={"time_limit": time_limit_s, "mip_rel_gap": gap},
    )
    if result.status == 2:
        return Solved(worker_n=None, cost=np.inf, bound=known_cost)
    proved = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    bound = max(float(relaxed.fun), min(proved, known_cost))
    if result.x is None:
        return Solved(worker_n=None, cost=np.inf, bound=bound)
    chosen_ME = groups_GE[is_open_G][result.x > 0.5]
    return Solved(worker_n=np.argmax(chosen_ME, axis=0), cost=float(result.fun), bound=min(bound, float(result.fun)))


def group_sizes(num_experts: int, bounds: LayerBounds) -> range:
    """Experts that a worker may host if all are hosted."""
    max_size = min(int(bounds.max_instances_W.max()), num_experts)
    return range(max(1, num_experts - (len(bounds.max_load_W) - 1) * max_size), max_size + 1)


def _groups(sets: ExpertSets, bounds: LayerBounds) -> tuple[BoolArray, FloatArray]:
    """Groups that a worker may host, shape (G, E), and the share of the tokens that choose any of their experts."""
    num_experts = len(bounds.load_E)
    max_load = float(bounds.max_load_W.max())
    slack = 1e-9 * float(bounds.load_E.sum())
    # The others must be able to take what a worker does not.
    min_load = float(bounds.load_E.sum()) - (len(bounds.max_load_W) - 1) * max_load
    missed_UE = np.ones((len(sets.weight_U), num_experts))
    np.put_along_axis(missed_UE, sets.experts_Uk, 0.0, axis=1)
    masks, costs = [], []
    for size in group_sizes(num_experts, bounds):
        prefixes = np.array(list(combinations(range(num_experts), size - 1)), dtype=np.int64)
        prefixes = prefixes.reshape(comb(num_experts, size - 1), size - 1)
        for begin in range(0, len(prefixes), _PREFIXES):
            prefix_Pj = prefixes[begin : begin + _PREFIXES]
            missed_UP = np.repeat(sets.weight_U[:, np.newaxis], len(prefix_Pj), axis=1)
            for expert_P in prefix_Pj.T:
                missed_UP *= missed_UE[:, expert_P]
            missed_PE = missed_UP.T @ missed_UE
            load_PE = bounds.load_E[prefix_Pj].sum(axis=1)[:, np.newaxis] + bounds.load_E
            last_P = prefix_Pj[:, -1:] if size > 1 else np.full((len(prefix_Pj), 1), -1)
            is_group_PE = (
                (np.arange(num_experts) > last_P) & (load_PE <= max_load + slack) & (load_PE >= min_load - slack)
            )
            prefix_G, expert_G = np.nonzero(is_group_PE)
            mask_GE = np.zeros((len(prefix_G), num_experts), dtype=np.bool_)
            np.put_along_axis(mask_GE, prefix_Pj[prefix_G], True, axis=1)
            mask_GE[np.arange(len(prefix_G)), expert_G] = True
            masks.append(mask_GE)
            costs.append(sets.weight_U.sum() - missed_PE[prefix_G, expert_G])
    return np.concatenate(masks), np.concatenate(costs)
