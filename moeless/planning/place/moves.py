"""Few moves that pay: take instances off a layer's busiest worker, as long as what is gained exceeds the transfers.

A move brings one instance to another worker. A swap is two moves. Each is judged by the sum of load² / speed, which
falls also where several workers are equally busy and one move alone does not relieve all of them; what counts in the
end is the busiest worker once the shares are split anew. Of the moves tried for a layer those are made, from the first
on, that leave the greatest gain over cost; none if that is not above zero.

Shapes: n instances of one layer, W workers, F functions with instances, G replicated ones with load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.planning.place.heaviest_first import max_singles
from moeless.planning.place.shares import descend
from moeless_predictors.compiled import compiled

_PATIENCE = 3
"""Consecutive steps without improvement after which the search stops for a layer."""
_MIN_GAIN = 1e-9
"""Relative; below it is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TransferTimes:
    """Seconds of bringing an instance to a worker by the fastest way: from a worker that has it, or from the host."""

    node_W: IntArray
    fetch_s: float
    local_s: float
    remote_s: float

    @classmethod
    def of(cls, cluster: Cluster, model: ModelShape) -> TransferTimes:
        fetch_s, local_s, remote_s = (
            model.expert_bytes / bytes_per_s
            for bytes_per_s in (cluster.fetch_bytes_per_s, cluster.local_bytes_per_s, cluster.remote_bytes_per_s)
        )
        return cls(
            node_W=cluster.node_W.copy(),
            fetch_s=fetch_s,
            local_s=min(fetch_s, local_s),
            remote_s=min(fetch_s, remote_s),
        )

    @property
    def min_s(self) -> float:
        """Smallest time of all ways to move."""
        return min(self.local_s, self.remote_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveLimits:
    """Conditions under which moving instances of a layer pays."""

    max_moves: int
    max_imbalance: float
    """Stop once busiest over perfectly balanced is at most this."""
    value_s: float
    """Seconds gained over the plan's time in force, for each token less on the busiest worker of speed 1."""
    spreads_singles: bool = False
    """No worker gets more than its part of the functions with a single instance, or than it had."""


@dataclass(slots=True)
class LayerMoves:
    """Result for one layer: its instances' workers and shares after the moves."""

    worker_n: IntArray
    share_n: FloatArray
    num_moves: int = 0


def improve_layer(
    expert_n: IntArray,
    worker_n: IntArray,
    share_n: FloatArray,
    work_E: FloatArray,
    free_W: IntArray,
    speed_W: FloatArray,
    *,
    limits: MoveLimits,
    transfers: TransferTimes,
) -> LayerMoves:
    """Moves for one layer, at most `limits.max_moves`.

    Args:
        expert_n: ascending.
        free_W: instances that still fit each worker; not changed.
    """
    starts_F = np.flatnonzero(np.diff(expert_n, prepend=-1))
    count_F = np.diff(starts_F, append=len(expert_n))
    load_F = work_E[expert_n[starts_F]].astype(np.float64)
    replicated = np.flatnonzero((count_F > 1) & (load_F > 0))
    replicated = replicated[np.argsort(-load_F[replicated], kind="stable")]
    best_worker_n, best_share_n, num_moves = _improve(
        np.repeat(np.arange(len(starts_F)), count_F),
        worker_n.astype(np.int64),
        share_n.astype(np.float64),
        load_F,
        np.append(starts_F, len(expert_n)),
        replicated,
        free_W.astype(np.int64),
        speed_W.astype(np.float64),
        limits.max_moves,
        limits.max_imbalance,
        limits.value_s,
        max_singles(count_F == 1, len(speed_W)) if limits.spreads_singles else len(starts_F),
        transfers.node_W,
        (transfers.fetch_s, transfers.local_s, transfers.remote_s),
    )
    return LayerMoves(best_worker_n, best_share_n, num_moves)


@compiled
def _improve(
    function_n: IntArray,
    worker_n: IntArray,
    share_n: FloatArray,
    load_F: FloatArray,
    bounds_F1: IntArray,
    replicated_G: IntArray,
    free_W: IntArray,
    speed_W: FloatArray,
    max_moves: int,
    max_imbalance: float,
    value_s: float,
    max_single: int,
    node_W: IntArray,
    transfer_s: tuple[float, float, float],
) -> tuple[IntArray, FloatArray, int]:
    """Changes `worker_n` and `free_W`, which are copies."""
    num_instances, num_workers = len(worker_n), len(speed_W)
    best_worker_n, best_share_n, best_moves = worker_n.copy(), share_n.copy(), 0
    tokens_n = load_F[function_n] * share_n
    has_FW = np.zeros((len(load_F), num_workers), dtype=np.bool_)
    load_W = np.zeros(num_workers)
    singles_W = np.zeros(num_workers, dtype=np.int64)
    is_single_F = bounds_F1[1:] - bounds_F1[:-1] == 1
    for n in range(num_instances):
        singles_W[worker_n[n]] += is_single_F[function_n[n]]
        has_FW[function_n[n], worker_n[n]] = True
        load_W[worker_n[n]] += tokens_n[n]
    starts_G = bounds_F1[replicated_G]
    count_G = bounds_F1[replicated_G + 1] - starts_G
    load_G = load_F[replicated_G]
    ideal = load_W.sum() / speed_W.sum()
    start = busiest = (load_W / speed_W).max()
    best_net, spent_s, num_moves, worse = 0.0, 0.0, 0, 0
    while busiest > max_imbalance * ideal and worse < _PATIENCE and num_moves < max_moves:
        first, first_target, second, second_target = _best_step(
            function_n,
            worker_n,
            tokens_n,
            load_W,
            has_FW,
            bounds_F1,
            free_W,
            speed_W,
            max_single - singles_W,
            max_moves - num_moves,
        )
        if first < 0:
            break
        for n, target in ((first, first_target), (second, second_target)):
            if n < 0:
                continue
            has_W = has_FW[function_n[n]]
            spent_s += _transfer_s(has_W, target, node_W, transfer_s)
            origin = worker_n[n]
            has_W[origin], has_W[target] = False, True
            free_W[origin] += 1
            free_W[target] -= 1
            singles_W[origin] -= is_single_F[function_n[n]]
            singles_W[target] += is_single_F[function_n[n]]
            load_W[origin] -= tokens_n[n]
            load_W[target] += tokens_n[n]
            worker_n[n] = target
            num_moves += 1
        if len(starts_G):
            descend(starts_G, count_G, load_G, worker_n, tokens_n, load_W, speed_W)
        busiest = (load_W / speed_W).max()
        net = (start - busiest) * value_s - spent_s
        worse += 1
        if net > best_net:
            worse, best_net, best_moves = 0, net, num_moves
            best_worker_n[:] = worker_n
            for n in range(num_instances):
                load = load_F[function_n[n]]
                best_share_n[n] = tokens_n[n] / load if load > 0 else share_n[n]
    return best_worker_n, best_share_n, best_moves


@compiled
def _transfer_s(has_W: BoolArray, target: int, node_W: IntArray, transfer_s: tuple[float, float, float]) -> float:
    seconds = transfer_s[0]
    for worker in range(len(has_W)):
        if has_W[worker]:
            seconds = min(seconds, transfer_s[1] if node_W[worker] == node_W[target] else transfer_s[2])
    return seconds


@compiled
def _gain(from_load: float, from_speed: float, to_load: float, to_speed: float, tokens: float) -> float:
    """Return the decrease of two workers' load² / speed when `tokens` go from one to the other."""
    return tokens * ((2 * from_load - tokens) / from_speed - (2 * to_load + tokens) / to_speed)


@compiled
def _best_step(
    function_n: IntArray,
    worker_n: IntArray,
    tokens_n: FloatArray,
    load_W: FloatArray,
    has_FW: BoolArray,
    bounds_F1: IntArray,
    free_W: IntArray,
    speed_W: FloatArray,
    room_W: IntArray,
    max_moves: int,
) -> tuple[int, int, int, int]:
    """The step that lowers load² / speed most for each instance it moves: one or two instances and where they go; -1
    for none. Of equally good ones, the first of: one off the busiest worker, a sibling, a swap.

    Args:
        room_W: functions with a single instance that each worker may still take.
    """
    num_workers = len(speed_W)
    busiest = int(np.argmax(load_W / speed_W))
    high, speed = load_W[busiest], speed_W[busiest]
    best = _MIN_GAIN * high * high
    step = (-1, -1, -1, -1)
    for n in range(len(worker_n)):
        if worker_n[n] != busiest or tokens_n[n] <= 0:
            continue
        has_W = has_FW[function_n[n]]
        is_single = bounds_F1[function_n[n] + 1] - bounds_F1[function_n[n]] == 1
        for target in range(num_workers):
            if free_W[target] > 0 and not has_W[target] and (room_W[target] > 0 or not is_single):
                gain = _gain(high, speed, load_W[target], speed_W[target], tokens_n[n])
                if gain > best:
                    best, step = gain, (n, target, -1, -1)
    for n in range(len(worker_n)):
        if worker_n[n] != busiest or tokens_n[n] <= 0:
            continue
        function = function_n[n]
        for sibling in range(bounds_F1[function], bounds_F1[function + 1]):
            if sibling == n:
                continue
            gain, target = _sibling_gain(
                worker_n[sibling], tokens_n[sibling], busiest, tokens_n[n], load_W, has_FW[function], free_W, speed_W
            )
            if gain > best:
                best, step = gain, (sibling, target, -1, -1)
    if max_moves < 2:
        return step
    for n in range(len(worker_n)):
        if worker_n[n] != busiest or tokens_n[n] <= 0:
            continue
        has_W = has_FW[function_n[n]]
        is_single = bounds_F1[function_n[n] + 1] - bounds_F1[function_n[n]] == 1
        for other in range(len(worker_n)):
            target = worker_n[other]
            less = tokens_n[n] - tokens_n[other]
            other_is_single = bounds_F1[function_n[other] + 1] - bounds_F1[function_n[other]] == 1
            if is_single != other_is_single and room_W[target if is_single else busiest] <= 0:
                continue
            if less > 0 and not has_W[target] and not has_FW[function_n[other], busiest]:
                gain = _gain(high, speed, load_W[target], speed_W[target], less) / 2
                if gain > best:
                    best, step = gain, (n, target, other, busiest)
    return step


@compiled
def _sibling_gain(
    origin: int,
    tokens: float,
    busiest: int,
    own: float,
    load_W: FloatArray,
    has_W: BoolArray,
    free_W: IntArray,
    speed_W: FloatArray,
) -> tuple[float, int]:
    """Find the best new worker for another instance of a function that the busiest worker hosts.

    There it can take more of the busiest worker's tokens. Returns the largest decrease of load² / speed, and that
    worker.

    Args:
        origin, tokens: the instance's worker and tokens.
        own: tokens of the function on the busiest worker.
    """
    speed, others, both = speed_W[busiest], load_W[busiest] - own, own + tokens
    left = load_W[origin] - tokens
    left_gain = (load_W[origin] ** 2 - left**2) / speed_W[origin]
    best, best_target = -np.inf, -1
    for target in range(len(speed_W)):
        if free_W[target] <= 0 or has_W[target]:
            continue
        load, to_speed = load_W[target], speed_W[target]
        # What the new place gets: both of the function's parts, split between it and the busiest worker.
        given = min(max((both + others + load) * to_speed / (to_speed + speed) - load, 0.0), both)
        squares = (others + both - given) ** 2 / speed + (load + given) ** 2 / to_speed
        gain = load_W[busiest] ** 2 / speed + load**2 / to_speed - squares + left_gain
        if gain > best:
            best, best_target = gain, target
    return best, best_target
