"""Whole experts placed anew for the exact load of one layer of one step: what could be had if moves were free.

UltraEP rebalances after the gate, when the load is known, for every micro-batch. Here its replicas cost nothing to
move and its placement nothing to find, so it says what knowing the load and moving in time could be worth at most to a
planner of whole experts. It is a heuristic, not a proven bound: longest calls first, then parts of the busiest
worker's calls go to less busy workers for as long as that helps and there are instances left.

Shapes: L layers, E experts, W workers, I instances of a layer.
"""

from __future__ import annotations

import numpy as np

from moeless.core.arrays import Float64Array, FloatArray, Int64Array
from moeless.core.call_cost import CallCost, call_work
from moeless_predictors.compiled import compiled

_MIN_GAIN = 1e-3
"""Smallest gain of a move, as a share of the busiest worker's time."""
_MAX_ROUNDS = 4
"""Times the workers: moves of a layer."""

_call_work = compiled(call_work)


def exact_parts(
    counts_LE: Int64Array, speed_W: FloatArray, cost: CallCost, *, max_instances: int
) -> tuple[Int64Array, Int64Array]:
    """Tokens and worker of each instance, shape (L, I) each; an instance without tokens is not called.

    Args:
        counts_LE: tokens of each expert.
        max_instances: of a layer, at least E.
    """
    tokens_LI = np.zeros((len(counts_LE), max_instances), dtype=np.int64)
    worker_LI = np.zeros_like(tokens_LI)
    _place_layers(counts_LE, speed_W.astype(np.float64), cost.numbers, tokens_LI, worker_LI)
    return tokens_LI, worker_LI


@compiled
def _place_layers(
    counts_LE: Int64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    tokens_LI: Int64Array,
    worker_LI: Int64Array,
) -> None:
    for layer in range(len(counts_LE)):
        busy_W = np.zeros(len(speed_W))
        used = 0
        for expert in np.argsort(-counts_LE[layer]):
            tokens = counts_LE[layer, expert]
            if tokens == 0:
                break
            work = _call_work(float(tokens), cost[0], cost[1], cost[2])
            worker = int(np.argmin(busy_W + work / speed_W))
            busy_W[worker] += work / speed_W[worker]
            tokens_LI[layer, used], worker_LI[layer, used] = tokens, worker
            used += 1
        # An expert without tokens keeps its instance, which no other takes the place of.
        room = used + tokens_LI.shape[1] - counts_LE.shape[1]
        for _ in range(_MAX_ROUNDS * len(speed_W)):
            moved = _relieve(tokens_LI[layer, :room], worker_LI[layer, :room], used, busy_W, speed_W, cost)
            if moved < 0:
                break
            used += moved


@compiled
def _relieve(
    tokens_I: Int64Array,
    worker_I: Int64Array,
    used: int,
    busy_W: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
) -> int:
    """Move a call of the busiest worker, or a part of one, to where the later of the two workers is done first.

    Returns: instances that were added, or -1 where no move helps.
    """
    busiest = int(np.argmax(busy_W))
    best_end, best, best_worker, best_part = busy_W[busiest] * (1 - _MIN_GAIN), -1, -1, 0
    for instance in range(used):
        if worker_I[instance] != busiest:
            continue
        tokens = tokens_I[instance]
        before = _call_work(float(tokens), cost[0], cost[1], cost[2])
        for worker in range(len(busy_W)):
            if worker == busiest or busy_W[worker] >= best_end:
                continue
            gap = busy_W[busiest] - busy_W[worker] - cost[0] / speed_W[worker]
            part = int(gap / ((1 + cost[2]) * (1 / speed_W[busiest] + 1 / speed_W[worker])))
            for moved in (tokens, part):
                if moved < 1 or moved > tokens or (moved < tokens and used >= len(tokens_I)):
                    continue
                after = _call_work(float(tokens - moved), cost[0], cost[1], cost[2])
                added = _call_work(float(moved), cost[0], cost[1], cost[2])
                end = max(
                    busy_W[busiest] - (before - after) / speed_W[busiest], busy_W[worker] + added / speed_W[worker]
                )
                if end < best_end:
                    best_end, best, best_worker, best_part = end, instance, worker, moved
    if best < 0:
        return -1
    tokens = tokens_I[best]
    after = _call_work(float(tokens - best_part), cost[0], cost[1], cost[2])
    busy_W[busiest] -= (_call_work(float(tokens), cost[0], cost[1], cost[2]) - after) / speed_W[busiest]
    busy_W[best_worker] += _call_work(float(best_part), cost[0], cost[1], cost[2]) / speed_W[best_worker]
    if best_part == tokens:
        worker_I[best] = best_worker
        return 0
    tokens_I[best] = tokens - best_part
    tokens_I[used], worker_I[used] = best_part, best_worker
    return 1
