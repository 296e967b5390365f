"""Split each layer's tokens over replicas, using this step's real counts.

A plan's shares are right on average; a step's tokens are not the average. The dispatcher knows every expert's tokens
before it sends any, so it can even out the workers with the replicas that the plan gave it. Below some number of tokens
an expert's call takes a constant time, in which its weights are read: such a function is not split but given to the
less busy of its workers. Above that number its tokens are shared.

Called by dispatch for each layer and by the simulator for all layers of a step, with the same numbers. The loops are
compiled: they lie between two layers of a step.

Shapes: L layers, E experts, W workers, F functions that have replicas, N instances of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from moeless.core.arrays import Float64Array, Int64Array
from moeless.core.call_cost import CallCost, call_work
from moeless_predictors.compiled import compiled

_GOLDEN = 0.6180339887498949
"""Steps of this ratio spread single tokens over replicas in proportion to their shares."""
_ENOUGH = 1.02
"""Stop when the busiest worker is within 2 % of the mean."""
_MIN_GAIN = 0.002
"""Smallest gain of a move, as a share of the busiest worker's time."""
_MAX_ROUNDS = 24
_WHOLE_GAIN = 1.1
"""By the plan's shares all workers are level, not only the busiest one lower: that is left for no small gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """The functions that have more than one instance, in the order of their layers."""

    function_L: Int64Array
    """Number of each layer's first function, and at last that of all functions; shape (L + 1)."""
    instance_F: Int64Array
    """Number of each function's first instance, and at last that of all instances; shape (F + 1)."""
    worker_N: Int64Array
    """Worker of each instance; a function's instances are on different workers."""
    share_N: Float64Array
    """Planned share of its function's tokens; a function's shares sum to 1."""

    @classmethod
    def of_one_layer(cls, workers_F: Sequence[Sequence[int]], shares_F: Sequence[Sequence[float]]) -> Replicas:
        """Build from one layer's functions: each one's workers and their shares."""
        sizes = [len(workers) for workers in workers_F]
        return cls(
            function_L=np.array([0, len(sizes)]),
            instance_F=np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))),
            worker_N=np.array([worker for workers in workers_F for worker in workers], dtype=np.int64),
            share_N=np.array([share for shares in shares_F for share in shares], dtype=np.float64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareTurns:
    """Splits tokens over replicas by the plan's shares alone: whole tokens, each replica its share in the long run.

    Systematic sampling: replica n of a function has the interval from `from_N` to `upto_N` of its tokens, and the
    fraction that it gets more or less than whole tokens turns from step to step.
    """

    instance_F: Int64Array
    """Index of each function's first instance, as in Replicas."""
    from_N: Float64Array
    upto_N: Float64Array

    @classmethod
    def of(cls, replicas: Replicas) -> ShareTurns:
        """Turns of the plan's shares."""
        if not len(replicas.share_N):
            return cls(instance_F=replicas.instance_F, from_N=replicas.share_N, upto_N=replicas.share_N)
        first_F, last_F = replicas.instance_F[:-1], replicas.instance_F[1:] - 1
        upto_N = np.cumsum(replicas.share_N)
        before_F = (upto_N - replicas.share_N)[first_F]
        upto_N = upto_N - np.repeat(before_F, np.diff(replicas.instance_F))
        from_N = np.concatenate(([0.0], upto_N[:-1]))
        from_N[first_F], upto_N[last_F] = 0.0, 1.0
        return cls(instance_F=replicas.instance_F, from_N=from_N, upto_N=upto_N)

    def split(self, tokens_F: Int64Array, *, step: int) -> Int64Array:
        """Tokens of each instance, shape (N,); they sum to those of its function.

        Args:
            step: counts the steps, or a layer's calls.
        """
        tokens_N, phase = np.repeat(tokens_F, np.diff(self.instance_F)), step * _GOLDEN % 1.0
        upto_N = np.floor(tokens_N * self.upto_N + phase)
        return (upto_N - np.floor(tokens_N * self.from_N + phase)).astype(np.int64)


def balanced_split(
    tokens_F: Int64Array,
    replicas: Replicas,
    busy_LW: Float64Array,
    cost: CallCost,
    *,
    speed_W: Float64Array | None = None,
) -> Int64Array:
    """Share out the tokens of functions that have replicas, so that each layer's busiest worker is done early.

    A function of many tokens starts with the plan's shares, which fit the load that was forecast; one of few goes whole
    to the least busy of its workers, the largest first, as do all where that is better. Then, some rounds long and as
    long as it helps, one of the busiest worker's functions moves on to another worker that has it, whole or in part, or
    whole to one that passes on another in its stead.

    Args:
        tokens_F: of each function.
        busy_LW: what the other functions cost each worker; what is shared out is added to it.
        speed_W: of the workers; default: all 1.
    Returns: the tokens of each instance, shape (N); they sum to those of its function.
    """
    split_N = np.zeros(len(replicas.worker_N), dtype=np.int64)
    speeds = np.ones(busy_LW.shape[1]) if speed_W is None else speed_W
    _split_layers(
        tokens_F,
        replicas.function_L,
        replicas.instance_F,
        replicas.worker_N,
        replicas.share_N,
        busy_LW,
        speeds,
        cost.numbers,
        split_N,
    )
    return split_N


@cache
def warm_up() -> None:
    """Compile the loops, or load them, once in a process: seconds that no step should wait for."""
    replicas = Replicas.of_one_layer([[0, 1]], [[0.5, 0.5]])
    balanced_split(np.array([4]), replicas, np.array([[9.0, 0.0]]), CallCost())


@compiled
def _split_layers(
    tokens_F: Int64Array,
    function_L: Int64Array,
    instance_F: Int64Array,
    worker_N: Int64Array,
    share_N: Float64Array,
    busy_LW: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    split_N: Int64Array,
) -> None:
    sum_speed = speed_W.sum()
    for layer in range(len(function_L) - 1):
        first, last = function_L[layer], function_L[layer + 1]
        if first == last:
            continue
        busy_W = busy_LW[layer]
        before_W = busy_W.copy()
        has_large = _begin(tokens_F, first, last, instance_F, worker_N, share_N, busy_W, speed_W, cost, split_N, True)
        if has_large and cost[0] > 0:
            # Each part is a call of its own: where these cost much, all are better whole.
            by_shares_N, by_shares_W = split_N[instance_F[first] : instance_F[last]].copy(), busy_W.copy()
            busy_W[:] = before_W
            _begin(tokens_F, first, last, instance_F, worker_N, share_N, busy_W, speed_W, cost, split_N, False)
            if by_shares_W.max() <= _WHOLE_GAIN * busy_W.max():
                busy_W[:] = by_shares_W
                split_N[instance_F[first] : instance_F[last]] = by_shares_N
        total = 0.0
        for worker in range(len(busy_W)):
            total += busy_W[worker] * speed_W[worker]
        enough = _ENOUGH * total / sum_speed
        _move_on(first, last, instance_F, worker_N, busy_W, speed_W, cost, split_N, enough)


_call_work = compiled(call_work)


@compiled
def _cost_of(tokens: int, cost: tuple[float, float, float]) -> float:
    return _call_work(float(tokens), cost[0], cost[1], cost[2])


def add_call_costs(
    tokens_N: Int64Array,
    place_N: Int64Array,
    cost: CallCost,
    busy_P: Float64Array,
    *,
    speed_N: Float64Array | None = None,
) -> None:
    """Add to `busy_P` the cost of a call of each instance.

    Args:
        tokens_N: of each instance; one without tokens is not called.
        place_N: index into `busy_P` of each instance: its worker, or its layer and worker.
        speed_N: of the instances' workers; default: all 1.
    """
    speeds = np.ones(len(tokens_N)) if speed_N is None else speed_N
    _add_call_costs(tokens_N, place_N, speeds, cost.numbers, busy_P)


@compiled
def _add_call_costs(
    tokens_N: Int64Array,
    place_N: Int64Array,
    speed_N: Float64Array,
    cost: tuple[float, float, float],
    busy_P: Float64Array,
) -> None:
    for instance in range(len(tokens_N)):
        if tokens_N[instance] > 0:
            busy_P[place_N[instance]] += _cost_of(tokens_N[instance], cost) / speed_N[instance]


@compiled
def _begin(
    tokens_F: Int64Array,
    first: int,
    last: int,
    instance_F: Int64Array,
    worker_N: Int64Array,
    share_N: Float64Array,
    busy_W: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    split_N: Int64Array,
    splits_large: bool,
) -> bool:
    """Large functions by their shares, if they are to be split, then the others whole: the largest first, of equals the
    one of fewer workers. Returns whether there are large ones."""
    max_whole = max(1.0, 2 * cost[1])
    has_large = False
    split_N[instance_F[first] : instance_F[last]] = 0
    whole = np.empty(last - first, dtype=np.int64)
    num_whole = 0
    for function in range(first, last):
        tokens = tokens_F[function]
        begin, end = instance_F[function], instance_F[function + 1]
        has_large |= tokens > max_whole
        if splits_large and tokens > max_whole:
            largest, left = begin, tokens
            for instance in range(begin, end):
                split_N[instance] = int(tokens * share_N[instance])
                left -= split_N[instance]
                if share_N[instance] > share_N[largest]:
                    largest = instance
            split_N[largest] += left
            for instance in range(begin, end):
                worker = worker_N[instance]
                busy_W[worker] += _cost_of(split_N[instance], cost) / speed_W[worker]
        elif tokens > 0:
            whole[num_whole] = function
            num_whole += 1
    for index in range(1, num_whole):  # few: sorted by insertion
        function = whole[index]
        place = index
        while place > 0 and _is_before(function, whole[place - 1], tokens_F, instance_F, cost):
            whole[place] = whole[place - 1]
            place -= 1
        whole[place] = function
    for function in whole[:num_whole]:
        added = _cost_of(tokens_F[function], cost)
        best, best_end = -1, np.inf
        for instance in range(instance_F[function], instance_F[function + 1]):
            end = busy_W[worker_N[instance]] + added / speed_W[worker_N[instance]]
            if end < best_end:
                best, best_end = instance, end
        split_N[best] = tokens_F[function]
        busy_W[worker_N[best]] = best_end
    return has_large


@compiled
def _is_before(
    function: int, other: int, tokens_F: Int64Array, instance_F: Int64Array, cost: tuple[float, float, float]
) -> bool:
    mine, its = _cost_of(tokens_F[function], cost), _cost_of(tokens_F[other], cost)
    if mine != its:
        return mine > its
    breadth, its_breadth = instance_F[function + 1] - instance_F[function], instance_F[other + 1] - instance_F[other]
    return bool(breadth < its_breadth)


@compiled
def _move_on(
    first: int,
    last: int,
    instance_F: Int64Array,
    worker_N: Int64Array,
    busy_W: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    split_N: Int64Array,
    enough: float,
) -> None:
    """Take calls or parts of them off the busiest worker while whoever takes over is less busy for it."""
    min_call = _cost_of(1, cost)
    for _ in range(_MAX_ROUNDS):
        busiest = int(np.argmax(busy_W))
        high = busy_W[busiest]
        if high <= enough:
            return
        best_end, best_origin, best_target, best_moved = high * (1 - _MIN_GAIN), -1, -1, 0
        for function in range(first, last):
            begin, end = instance_F[function], instance_F[function + 1]
            origin = -1
            for instance in range(begin, end):
                if worker_N[instance] == busiest and split_N[instance] > 0:
                    origin = instance
            if origin < 0:
                continue
            tokens = split_N[origin]
            for target in range(begin, end):
                worker, held = worker_N[target], split_N[target]
                before = 0.0 if held else min_call / speed_W[worker]
                if target == origin or busy_W[worker] + before >= best_end:
                    continue
                part = _part(tokens, held, high - busy_W[worker], cost, speed_W[busiest], speed_W[worker])
                for moved in (tokens, part):
                    left = high - (_cost_of(tokens, cost) - _cost_of(tokens - moved, cost)) / speed_W[busiest]
                    added = _cost_of(held + moved, cost) - _cost_of(held, cost)
                    later = max(left, busy_W[worker] + added / speed_W[worker])
                    if later < best_end:
                        best_end, best_origin, best_target, best_moved = later, origin, target, moved
        if best_origin < 0:
            if not _pass_along(first, last, instance_F, worker_N, busy_W, speed_W, cost, split_N, busiest):
                return
            continue
        tokens, held, worker = split_N[best_origin], split_N[best_target], worker_N[best_target]
        busy_W[busiest] -= (_cost_of(tokens, cost) - _cost_of(tokens - best_moved, cost)) / speed_W[busiest]
        busy_W[worker] += (_cost_of(held + best_moved, cost) - _cost_of(held, cost)) / speed_W[worker]
        split_N[best_origin] -= best_moved
        split_N[best_target] += best_moved


@compiled
def _part(
    tokens: int, held: int, gap: float, cost: tuple[float, float, float], from_speed: float, to_speed: float
) -> int:
    """Return how many of a call's tokens to move so that both workers finish at the same time; all of them where a part
    takes as long to read as the whole."""
    call, floor, link = cost
    if tokens <= floor:
        return tokens
    token = 1 + link
    new = 0.0 if held else call / to_speed
    part = int((gap - new) / (token / from_speed + token / to_speed))
    if part < 1 or part >= tokens or held + part < floor:
        return tokens
    return part


@compiled
def _pass_along(
    first: int,
    last: int,
    instance_F: Int64Array,
    worker_N: Int64Array,
    busy_W: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    split_N: Int64Array,
    busiest: int,
) -> bool:
    """Move a call off the busiest worker to one that passes on another, and so on to one with room (an augmenting path,
    found breadth first). Returns whether there is one that leaves all workers less busy than the busiest was."""
    enough = busy_W[busiest] * (1 - _MIN_GAIN)
    num_workers = len(busy_W)
    came_from_W = np.full(num_workers, -1)  # the worker before it on the path
    origin_W, target_W = np.empty(num_workers, dtype=np.int64), np.empty(num_workers, dtype=np.int64)
    queue, num_queued = np.empty(num_workers, dtype=np.int64), 1
    queue[0] = busiest
    came_from_W[busiest] = busiest
    done = 0
    while done < num_queued:
        worker = queue[done]
        done += 1
        for function in range(first, last):
            begin, end = instance_F[function], instance_F[function + 1]
            origin, num_parts = -1, 0
            for instance in range(begin, end):
                if split_N[instance] > 0:
                    num_parts += 1
                    if worker_N[instance] == worker:
                        origin = instance
            if origin < 0 or num_parts > 1:
                continue  # those that are split have been levelled already
            for target in range(begin, end):
                receiver = worker_N[target]
                if came_from_W[receiver] >= 0:
                    continue
                came_from_W[receiver], origin_W[receiver], target_W[receiver] = worker, origin, target
                if busy_W[receiver] + _cost_of(split_N[origin], cost) / speed_W[receiver] < enough:
                    if _apply_path(
                        busy_W, speed_W, cost, split_N, came_from_W, origin_W, target_W, busiest, receiver, enough
                    ):
                        return True
                    came_from_W[receiver] = -1
                else:
                    queue[num_queued] = receiver
                    num_queued += 1
    return False


@compiled
def _apply_path(
    busy_W: Float64Array,
    speed_W: Float64Array,
    cost: tuple[float, float, float],
    split_N: Int64Array,
    came_from_W: Int64Array,
    origin_W: Int64Array,
    target_W: Int64Array,
    busiest: int,
    final: int,
    enough: float,
) -> bool:
    """Make the moves that lead to `final`, unless one of the workers between is then as busy as the busiest."""
    after_W = busy_W.copy()
    receiver = final
    while receiver != busiest:
        worker = came_from_W[receiver]
        added = _cost_of(split_N[origin_W[receiver]], cost)
        after_W[worker] -= added / speed_W[worker]
        after_W[receiver] += added / speed_W[receiver]
        receiver = worker
    receiver = final
    while True:
        if after_W[receiver] >= enough:
            return False
        if receiver == busiest:
            break
        receiver = came_from_W[receiver]
    busy_W[:] = after_W
    receiver = final
    while receiver != busiest:
        origin, target = origin_W[receiver], target_W[receiver]
        split_N[target], split_N[origin] = split_N[origin], 0
        receiver = came_from_W[receiver]
    return True
