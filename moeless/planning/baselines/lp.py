"""The split of SGLang's LPLB: each layer's tokens over replicas, by linear programme, from the step's real counts.

LPLB keeps EPLB's placement and chooses for every batch how many of a function's tokens each of its replicas gets, so
that the busiest worker has as few tokens as possible:

    minimise M, subject to: the parts of a function sum to its tokens; the parts on a worker and what it has anyway are
    at most M; no part is negative.

This is a transport problem: for a given M, a flow from functions to their workers, each with room for M. So a maximum
flow says whether M suffices, and its minimum cut, where it does not, is a set of workers that must hold more; their
mean is the next M. Tokens are whole here, so M is the programme's optimum rounded up. Tests compare it with HiGHS,
which takes milliseconds a layer; this takes microseconds.

Shapes: L layers, W workers, F functions that have replicas, N instances of these.
"""

from __future__ import annotations

import numpy as np

from moeless.core.arrays import Int64Array
from moeless.planning.step_balance import Replicas
from moeless_predictors.compiled import compiled


def lp_split(tokens_F: Int64Array, replicas: Replicas, busy_LW: Int64Array) -> Int64Array:
    """Tokens of each instance, shape (N,), that minimise the tokens of each layer's busiest worker.

    Args:
        tokens_F: of each function.
        busy_LW: tokens of the other functions on each worker; what is split is added to it.
    """
    split_N = np.zeros(len(replicas.worker_N), dtype=np.int64)
    sizes_F = np.diff(replicas.instance_F)
    _split_layers(
        tokens_F.astype(np.int64),
        replicas.function_L,
        replicas.instance_F,
        replicas.worker_N,
        np.repeat(np.arange(len(sizes_F)), sizes_F),
        busy_LW,
        split_N,
    )
    return split_N


@compiled
def _split_layers(
    tokens_F: Int64Array,
    function_L: Int64Array,
    instance_F: Int64Array,
    worker_N: Int64Array,
    function_N: Int64Array,
    busy_LW: Int64Array,
    split_N: Int64Array,
) -> None:
    for layer in range(len(function_L) - 1):
        first, last = function_L[layer], function_L[layer + 1]
        if first == last:
            continue
        busy_W = busy_LW[layer]
        total = busy_W.sum() + tokens_F[first:last].sum()
        max_tokens = max(int(busy_W.max()), -(-total // len(busy_W)))
        for function in range(first, last):
            left = tokens_F[function]
            while left > 0:
                moved, max_tokens = _augment(
                    function, left, first, last, instance_F, worker_N, function_N, busy_W, split_N, max_tokens
                )
                left -= moved


@compiled
def _augment(
    source: int,
    left: int,
    first: int,
    last: int,
    instance_F: Int64Array,
    worker_N: Int64Array,
    function_N: Int64Array,
    busy_W: Int64Array,
    split_N: Int64Array,
    max_tokens: int,
) -> tuple[int, int]:
    """Send some of the function's tokens along the shortest path to a worker with room, found breadth first.

    Returns: tokens that were sent, and the tokens that a worker may have: raised where no worker with room is reached.
    """
    reached_F = np.zeros(last - first, dtype=np.bool_)
    came_by_W = np.full(len(busy_W), -1, dtype=np.int64)  # instance by which a worker was reached
    left_from_F = np.full(last - first, -1, dtype=np.int64)  # instance whose tokens a function would give up
    queue = np.empty(last - first, dtype=np.int64)
    queue[0], head, tail = source, 0, 1
    reached_F[source - first] = True
    goal = -1
    while head < tail and goal < 0:
        function = queue[head]
        head += 1
        for instance in range(instance_F[function], instance_F[function + 1]):
            worker = worker_N[instance]
            if came_by_W[worker] >= 0:
                continue
            came_by_W[worker] = instance
            if busy_W[worker] < max_tokens:
                goal = worker
                break
            for other in range(instance_F[first], instance_F[last]):
                if worker_N[other] == worker and split_N[other] > 0 and not reached_F[function_N[other] - first]:
                    reached_F[function_N[other] - first] = True
                    left_from_F[function_N[other] - first] = other
                    queue[tail] = function_N[other]
                    tail += 1
    if goal < 0:
        # The reached workers are full of tokens that can go nowhere else: they have to hold these, too.
        held, num_workers = left, 0
        for worker in range(len(busy_W)):
            if came_by_W[worker] >= 0:
                held += busy_W[worker]
                num_workers += 1
        return 0, max(max_tokens + 1, -(-held // num_workers))
    moved, worker = min(left, max_tokens - busy_W[goal]), goal
    while True:
        function = function_N[came_by_W[worker]]
        if function == source:
            break
        given_up = left_from_F[function - first]
        moved = min(moved, split_N[given_up])
        worker = worker_N[given_up]
    busy_W[goal] += moved
    worker = goal
    while True:
        instance = came_by_W[worker]
        split_N[instance] += moved
        function = function_N[instance]
        if function == source:
            break
        given_up = left_from_F[function - first]
        split_N[given_up] -= moved
        worker = worker_N[given_up]
    return moved, max_tokens
