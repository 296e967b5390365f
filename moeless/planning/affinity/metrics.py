"""Cost of a plan in tokens' trips: workers touched in each layer, and hops between consecutive layers.

Exact for a trace where no function has replicas. Replicas get tokens by their shares, whatever else a token chose, as
dispatch does it: then these are expected values, every choice of a replica taken as independent of the others.

Shapes: L layers, E experts, W workers, U distinct sets of one layer, k experts per token.
"""

from __future__ import annotations

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan
from moeless.planning.affinity.statistics import AffinityStatistics, ExpertSets


def workers_touched_L(plan: Plan, statistics: AffinityStatistics) -> FloatArray:
    """Mean number of different workers that a token's experts lie on, for each layer: from 1 to k.

    With a hub every one of them is a message with the token's hidden state, and another with the answer.
    Raises: ConfigError if the plan is of another model, or lacks an instance of a function that got tokens.
    """
    shares_LEW = checked_shares(plan, statistics)
    return np.array([touched(shares_EW, sets) for shares_EW, sets in zip(shares_LEW, statistics.sets, strict=True)])


def hops_L(plan: Plan, statistics: AffinityStatistics) -> FloatArray:
    """Share of pairs of a token's experts in consecutive layers that lie on different workers, shape (L - 1,).

    A token has k × k such pairs for each two layers. It is what ExFlow (arXiv 2401.08383) and MoETuner (arXiv
    2502.06643) make small for all-to-all expert parallelism.
    Raises: as `workers_touched_L`.
    """
    shares_LEW = checked_shares(plan, statistics)
    return np.array([
        hops(shares_LEW[layer], shares_LEW[layer + 1], transitions_EE)
        for layer, transitions_EE in enumerate(statistics.transitions_LEE)
    ])  # fmt: skip


def balance_L(plan: Plan, load_LE: FloatArray, speed_W: FloatArray) -> FloatArray:
    """Load / speed of each layer's busiest worker over that of perfect balance, >= 1; 1 for a layer without load."""
    load_LW = plan.worker_load_LW(load_LE)
    ideal_L = load_LW.sum(axis=1) / speed_W.sum()
    return np.where(ideal_L > 0, (load_LW / speed_W).max(axis=1) / np.where(ideal_L > 0, ideal_L, 1.0), 1.0)


def touched(shares_EW: FloatArray, sets: ExpertSets) -> float:
    """Return the expected number of workers that a token touches in one layer."""
    missed_UW = np.ones((len(sets.weight_U), shares_EW.shape[1]))
    for experts_U in sets.experts_Uk.T:
        missed_UW *= 1.0 - shares_EW[experts_U]
    return float(sets.weight_U @ (1.0 - missed_UW).sum(axis=1))


def hops(before_EW: FloatArray, after_EW: FloatArray, transitions_EE: FloatArray) -> float:
    """Return the share of pairs of two layers' experts that lie on different workers."""
    return float(transitions_EE.sum() - np.einsum("ew,ef,fw->", before_EW, transitions_EE, after_EW, optimize=True))


def checked_shares(plan: Plan, statistics: AffinityStatistics) -> FloatArray:
    """The plan's shares, shape (L, E, W), once they are known to be for this routing."""
    check_same_model(plan, statistics)
    missing = np.argwhere((plan.counts_LE == 0) & (statistics.load_LE > 0))
    if len(missing):
        layer, expert = missing[0]
        function = FunctionId(int(layer), int(expert))
        raise ConfigError(f"plan must have an instance of every function that gets tokens, got none of {function}")
    _, shares_LEW = plan.dense()
    return shares_LEW


def check_same_model(plan: Plan, statistics: AffinityStatistics) -> None:
    """Raises: ConfigError if plan and routing are of models of different shapes."""
    shape = (statistics.num_layers, statistics.num_experts)
    if (plan.num_layers, plan.num_experts) != shape:
        raise ConfigError(
            f"plan must be of {shape[0]} layers of {shape[1]} experts as the routing is, got {plan.num_layers} of "
            f"{plan.num_experts}"
        )
