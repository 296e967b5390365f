"""Lower bound of the hops between two consecutive layers, for every placement on equal workers.

The integer programme over pairs of groups: each worker hosts one group of the layer before and one of the layer after,
each expert is in exactly one, and the pairs of experts kept together are maximized. Its linear relaxation bounds the
optimum from above. It has (groups before × groups after) columns, of which those are added that are worth more than
the prices of their experts (column generation); at any time, prices y, and w for a worker, prove for W workers that no
more than sum(y) + W × (w + the most by which a column is worth more) can be kept (Lasdon's bound).

A chain of layers has at least the sum over its consecutive pairs.

Shapes: E experts, W workers, G groups before, H groups after, C columns.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_array

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.planning.affinity.groups import are_alike, group_sizes
from moeless.planning.affinity.search import LayerBounds

_CHUNK = 500
"""Groups of the layer before priced at a time."""
_MIN_CHUNKS = 8
"""Chunks priced even if the most valuable column is known earlier: more good columns, fewer rounds."""
_MAX_NEW = 1500
"""Columns added in a round."""
_ROUNDING = 1e-7
"""Error of a column's worth (at most 1) in single precision."""


def min_hops_bound(
    transitions_EE: FloatArray,
    before: LayerBounds,
    after: LayerBounds,
    *,
    known: list[tuple[IntArray, IntArray]],
    tolerance: float = 0.002,
    max_rounds: int = 100,
) -> float:
    """Share of pairs that lie on different workers in any placement of two layers, each expert once.

    Args:
        known: placements that keep to the bounds: workers of the experts before and after; at least one.
        tolerance: stop once the bound is this close to that which the programme's relaxation can prove at best.
    Raises: ConfigError if the workers are not alike.
    """
    if not (are_alike(before) and are_alike(after)):
        raise ConfigError("bounds must be the same for all workers")
    num_experts, num_workers = len(before.load_E), len(before.max_load_W)
    groups_GE, groups_HE = _groups(before), _groups(after)
    reach_GE = groups_GE @ transitions_EE.astype(np.float32)
    workers = np.arange(num_workers)
    columns = [
        np.hstack([one_E[np.newaxis] == workers[:, np.newaxis], other_E[np.newaxis] == workers[:, np.newaxis]])
        for one_E, other_E in known
    ]
    max_kept = float(transitions_EE.sum())
    for _ in range(max_rounds):
        columns_C = np.concatenate(columns).astype(np.float64)
        before_CE, after_CE = columns_C[:, :num_experts], columns_C[:, num_experts:]
        solved = linprog(
            -np.einsum("ce,ce->c", before_CE @ transitions_EE, after_CE),
            A_eq=csc_array(columns_C.T),
            b_eq=np.ones(2 * num_experts),
            A_ub=csc_array(np.ones((1, len(columns_C)))),
            b_ub=[num_workers],
            method="highs",
        )
        assert solved.success, solved.message  # what is known is feasible
        price_E, worker_price = -solved.eqlin.marginals, max(-float(solved.ineqlin.marginals[0]), 0.0)
        excess, new = _worth_more(
            reach_GE, groups_GE, groups_HE, price_E.astype(np.float32), worker_price, int(after.max_instances_W.max())
        )
        proved = float(price_E.sum()) + num_workers * (worker_price + max(excess, 0.0) + _ROUNDING)
        max_kept = min(max_kept, proved)
        if not len(new) or max_kept <= -solved.fun * (1 + tolerance):
            break
        columns.append(new)
    return float(transitions_EE.sum()) - max_kept


def _worth_more(
    reach_GE: FloatArray,
    groups_GE: FloatArray,
    groups_HE: FloatArray,
    price_E: FloatArray,
    worker_price: float,
    max_after: int,
) -> tuple[float, FloatArray]:
    """The most by which a column is worth more than its price, and columns that are."""
    num_experts = groups_GE.shape[1]
    worth_GE = reach_GE - price_E[num_experts:]
    cost_G = groups_GE @ price_E[:num_experts] + np.float32(worker_price)
    # With the best experts after, whatever their load: no group before is worth more than this.
    best_G = np.maximum(-np.sort(-worth_GE, axis=1)[:, :max_after], 0).sum(axis=1) - cost_G
    order_G = np.argsort(-best_G, kind="stable")
    most, worth, found = -np.inf, [], []
    for begin in range(0, len(order_G), _CHUNK):
        chunk_g = order_G[begin : begin + _CHUNK]
        ceiling = float(best_G[chunk_g[0]])
        if ceiling <= most or (ceiling <= 0 and begin >= _MIN_CHUNKS * _CHUNK):
            break
        excess_gH = worth_GE[chunk_g] @ groups_HE.T
        mate_g = np.argmax(excess_gH, axis=1)
        excess_g = excess_gH[np.arange(len(chunk_g)), mate_g] - cost_G[chunk_g]
        most = max(most, float(excess_g.max()))
        is_new_g = excess_g > _ROUNDING
        worth.append(excess_g[is_new_g])
        found.append(np.hstack([groups_GE[chunk_g[is_new_g]], groups_HE[mate_g[is_new_g]]]))
    order = np.argsort(-np.concatenate(worth), kind="stable")[:_MAX_NEW]
    return most, np.concatenate(found)[order]


def _groups(bounds: LayerBounds) -> FloatArray:
    """Groups that a worker may host, shape (G, E)."""
    num_experts, num_workers = len(bounds.load_E), len(bounds.max_load_W)
    most, total = float(bounds.max_load_W.max()), float(bounds.load_E.sum())
    slack = 1e-9 * total
    masks = []
    for size in group_sizes(num_experts, bounds):
        members = np.array(list(combinations(range(num_experts), size)))
        load_G = bounds.load_E[members].sum(axis=1)
        members = members[(load_G <= most + slack) & (load_G >= total - (num_workers - 1) * most - slack)]
        mask_GE = np.zeros((len(members), num_experts), dtype=np.float32)
        np.put_along_axis(mask_GE, members, 1.0, axis=1)
        masks.append(mask_GE)
    return np.concatenate(masks)
