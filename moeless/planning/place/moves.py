"""Few moves that pay: take instances off a layer's busiest worker, as long as what is gained exceeds the transfers.

A move brings one instance to another worker. A swap is two moves. Each is judged by the sum of load² / speed, which
falls also where several workers are equally busy and one move alone does not relieve all of them; what counts in the
end is the busiest worker once the shares are split anew. Of the moves tried for a layer those are made, from the first
on, that leave the greatest gain over cost; none if that is not above zero.

Shapes: n instances of one layer, b of them on the busiest worker, s their siblings, W workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless.core.cluster import Cluster, ModelShape
from moeless.core.plan import BoolArray, FloatArray, IntArray
from moeless.planning.place.shares import min_max_shares

_PATIENCE = 3
"""Stop trying for a layer after so many steps that made nothing better."""
_LEAST_GAIN = 1e-9
"""Relative; below it is rounding."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One or two instances (indices into n) and where they go; `gain` is what load² / speed falls by."""

    moves: tuple[tuple[int, int], ...]
    gain: float


@dataclass(slots=True)
class LayerMoves:
    """What was found for a layer: the workers of its instances and their shares after the moves."""

    worker_n: IntArray
    share_n: FloatArray
    num_moves: int = 0
    num_tried: int = 0


def transfer_s(source_W: BoolArray, target: int, cluster: Cluster, model: ModelShape) -> float:
    """Seconds of bringing an instance to `target` by the fastest way: from a worker that has it, or from the host."""
    node_W = cluster.node_W
    rates = [cluster.load_bytes_per_s]
    if (source_W & (node_W == node_W[target])).any():
        rates.append(cluster.local_bytes_per_s)
    elif source_W.any():
        rates.append(cluster.remote_bytes_per_s)
    return model.expert_bytes / max(rates)


def improve_layer(
    expert_n: IntArray,
    worker_n: IntArray,
    share_n: FloatArray,
    load_E: FloatArray,
    free_W: IntArray,
    speed_W: FloatArray,
    *,
    max_moves: int,
    good_enough: float,
    value_s: float,
    cost_s: Callable[[int, IntArray, int], float],
) -> LayerMoves:
    """Moves for one layer, at most `max_moves`.

    Args:
        free_W: instances that still fit each worker; not changed.
        good_enough: stop once busiest over perfectly balanced is at most this.
        value_s: seconds gained over the plan's time in force, for each token less on the busiest worker of speed 1.
        cost_s: seconds that moving an instance costs: of its expert, the workers that have it, and the target.
    """
    best = LayerMoves(worker_n, share_n)
    ideal = load_E[expert_n].dot(share_n) / speed_W.sum()
    start = busiest = _busiest(worker_n, load_E[expert_n] * share_n, speed_W)
    best_net, spent_s, num_moves, worse = 0.0, 0.0, 0, 0
    free_W, worker_n, share_n = free_W.copy(), worker_n.copy(), share_n.copy()
    while busiest > good_enough * ideal and worse < _PATIENCE:
        step = _best_step(expert_n, worker_n, share_n, load_E, free_W, speed_W, max_moves=max_moves - num_moves)
        if step is None:
            break
        for index, target in step.moves:
            spent_s += cost_s(int(expert_n[index]), worker_n[expert_n == expert_n[index]], target)
            free_W[worker_n[index]] += 1
            free_W[target] -= 1
            worker_n[index] = target
        num_moves += len(step.moves)
        order_n = np.lexsort((worker_n, expert_n))
        share_n[order_n] = min_max_shares(
            np.zeros_like(expert_n), expert_n[order_n], worker_n[order_n], load_E[np.newaxis], speed_W,
            start_N=share_n[order_n],
        )  # fmt: skip
        busiest = _busiest(worker_n, load_E[expert_n] * share_n, speed_W)
        net = (start - busiest) * value_s - spent_s
        worse = 0 if net > best_net else worse + 1
        if net > best_net:
            best_net = net
            best = LayerMoves(worker_n.copy(), share_n.copy(), num_moves)
    best.num_tried = num_moves
    return best


def _busiest(worker_n: IntArray, tokens_n: FloatArray, speed_W: FloatArray) -> float:
    return float((np.bincount(worker_n, weights=tokens_n, minlength=len(speed_W)) / speed_W).max())


def _best_step(
    expert_n: IntArray,
    worker_n: IntArray,
    share_n: FloatArray,
    load_E: FloatArray,
    free_W: IntArray,
    speed_W: FloatArray,
    *,
    max_moves: int,
) -> _Step | None:
    """The step that lowers load² / speed most for each instance it moves; None if no step lowers it."""
    tokens_n = load_E[expert_n] * share_n
    load_W: FloatArray = np.bincount(worker_n, weights=tokens_n, minlength=len(speed_W)).astype(np.float64)
    busiest = int(np.argmax(load_W / speed_W))
    least = _LEAST_GAIN * load_W[busiest] ** 2
    on_b = np.flatnonzero((worker_n == busiest) & (tokens_n > 0))
    if max_moves < 1 or not len(on_b):
        return None
    hosts_nW = np.zeros((len(load_E), len(speed_W)), dtype=np.bool_)
    hosts_nW[expert_n, worker_n] = True
    steps = []
    tokens_b1 = tokens_n[on_b, np.newaxis]
    closed_W = free_W <= 0
    # One instance of the busiest worker to another.
    gain_bW = _gain(load_W[busiest], speed_W[busiest], load_W, speed_W, tokens_b1)
    gain_bW[hosts_nW[expert_n[on_b]] | closed_W] = -np.inf
    b, target = np.unravel_index(np.argmax(gain_bW), gain_bW.shape)
    steps.append(_Step(((int(on_b[b]), int(target)),), float(gain_bW[b, target])))
    steps.extend(_sibling_steps(expert_n, worker_n, tokens_n, load_W, speed_W, on_b, hosts_nW, closed_W))
    if max_moves >= 2:
        less_bn = tokens_b1 - tokens_n
        gain_bn = _gain(load_W[busiest], speed_W[busiest], load_W[worker_n], speed_W[worker_n], less_bn)
        gain_bn[hosts_nW[expert_n[on_b]][:, worker_n] | hosts_nW[expert_n, busiest]] = -np.inf
        b, n = np.unravel_index(np.argmax(gain_bn), gain_bn.shape)
        moves = ((int(on_b[b]), int(worker_n[n])), (int(n), busiest))
        steps.append(_Step(moves, float(gain_bn[b, n])))
    step = max(steps, key=lambda step: step.gain / len(step.moves))
    return step if step.gain > least else None


def _gain(
    from_load: FloatArray, from_speed: FloatArray, to_load: FloatArray, to_speed: FloatArray, tokens: FloatArray
) -> FloatArray:
    """What load² / speed of two workers falls by when `tokens` go from the one to the other."""
    gain: FloatArray = tokens * ((2 * from_load - tokens) / from_speed - (2 * to_load + tokens) / to_speed)
    return gain


def _sibling_steps(
    expert_n: IntArray,
    worker_n: IntArray,
    tokens_n: FloatArray,
    load_W: FloatArray,
    speed_W: FloatArray,
    on_b: IntArray,
    hosts_EW: BoolArray,
    closed_W: BoolArray,
) -> list[_Step]:
    """An instance elsewhere of a function that the busiest worker hosts goes where it can take more of its tokens."""
    busiest = worker_n[on_b[0]]
    on_busiest_E = np.full(len(hosts_EW), -1, dtype=np.int64)
    on_busiest_E[expert_n[on_b]] = on_b
    sibling_s = np.flatnonzero((on_busiest_E[expert_n] >= 0) & (worker_n != busiest))
    if not len(sibling_s):
        return []
    tokens_s1 = tokens_n[sibling_s, np.newaxis]
    own_s1 = tokens_n[on_busiest_E[expert_n[sibling_s]]][:, np.newaxis]
    others_s1 = load_W[busiest] - own_s1
    both_s1 = own_s1 + tokens_s1
    ratio_W = speed_W / (speed_W + speed_W[busiest])
    # What the new place gets: both of the function's parts, split between it and the busiest worker.
    given_sW = np.clip((both_s1 + others_s1 + load_W) * ratio_W - load_W, 0.0, both_s1)
    left_s = worker_n[sibling_s]
    squares_sW = (others_s1 + both_s1 - given_sW) ** 2 / speed_W[busiest] + (load_W + given_sW) ** 2 / speed_W
    before_sW = load_W[busiest] ** 2 / speed_W[busiest] + load_W**2 / speed_W
    left_gain_s = (load_W[left_s] ** 2 - (load_W[left_s] - tokens_n[sibling_s]) ** 2) / speed_W[left_s]
    gain_sW = before_sW - squares_sW + left_gain_s[:, np.newaxis]
    gain_sW[hosts_EW[expert_n[sibling_s]] | closed_W] = -np.inf
    s, target = np.unravel_index(np.argmax(gain_sW), gain_sW.shape)
    return [_Step(((int(sibling_s[s]), int(target)),), float(gain_sW[s, target]))]
