"""One budget of replicas for all layers, spent where it shortens the slowest worker's time the most.

Shapes: L MoE layers, E experts per layer, B extra replicas to spend, X extras.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeless.core.plan import FloatArray, IntArray
from moeless.planning.scale.greedy import Limits, extras_in_order


def replicas_by_benefit(
    load_LE: FloatArray,
    limits: Limits,
    *,
    num_extras: int,
    num_workers: int,
    worker_share: float = 0.0,
    seconds: Callable[[FloatArray], FloatArray] | None = None,
) -> IntArray:
    """Spend `num_extras` replicas beyond the least so that the layers' times add up to the least.

    A layer takes as long as its slowest worker. Heaviest-first placing keeps that worker's load within the mean load
    of the workers and (1 − 1/W) times the heaviest replica (Graham's bound), so what an extra is worth is the drop of
    this bound, in time. That is not concave in the extras (of two equally hot experts, relieving one is worth
    nothing), so no greedy rule is exact: this is a multiple-choice knapsack, solved exactly by dynamic programming
    over layers. Of equally good choices it takes the one with fewer instances in later layers.

    Args:
        load_LE: predicted tokens per step, shape (L, E), >= 0.
        num_extras: B; spent as far as it is worth anything.
        num_workers: W.
        worker_share: replicas with at most this share of the workers' mean load need no relief.
        seconds: time of so many tokens, never falling. Default: proportional.
    Returns: counts, shape (L, E).
    Source: the spending of a global budget is CRAFT's; there the benefit is found by replaying a trace.
    """
    mean_L = load_LE.sum(axis=1) / num_workers
    room_L = np.minimum(limits.budget_L - limits.least_LE.sum(axis=1), num_extras)
    extras = extras_in_order(load_LE, limits, room_L=room_L, enough_L=worker_share * mean_L)
    # The heaviest replica after x extras: whom the next would relieve, or whom none can.
    full_LE = extras.counts_LE(limits.least_LE, np.ones(len(extras.layer_X), dtype=np.bool_))
    last_L = (load_LE / np.maximum(full_LE, 1)).max(axis=1, initial=0.0)
    heaviest_X = np.maximum(extras.load_X, last_L[extras.layer_X])
    end_L = np.append(extras.start_L[1:], len(extras.layer_X))
    heaviest = np.insert(heaviest_X, end_L, last_L)
    layer = np.insert(extras.layer_X, end_L, np.arange(len(load_LE)))
    straggler = mean_L[layer] + (1 - 1 / num_workers) * heaviest
    time = straggler if seconds is None else seconds(straggler)
    choices = []
    for times in np.split(time, np.flatnonzero(np.diff(layer)) + 1):
        # Only the fewest extras for each time.
        sizes = np.concatenate(([0], 1 + np.flatnonzero(np.diff(times) < 0)))
        choices.append((sizes, times[sizes]))
    given_L = _spend(choices, num_extras)
    return extras.counts_LE(limits.least_LE, extras.rank_X < given_L[extras.layer_X])


def _spend(choices: list[tuple[IntArray, FloatArray]], num_extras: int) -> IntArray:
    """Which size to choose of each layer: the least sum of times with sizes that add up to at most `num_extras`.

    Args:
        choices: of each layer, sizes rising from 0 and the times that fall with them.
    """
    largest_L = np.array([sizes[-1] for sizes, _ in choices], dtype=np.int64)
    if largest_L.sum() <= num_extras:
        return largest_L
    # best_B[b]: the least time of the layers so far with at most b extras.
    best_B = np.zeros(num_extras + 1)
    chosen_LB = np.zeros((len(choices), num_extras + 1), dtype=np.int32)
    for layer, (sizes, times) in enumerate(choices):
        new_B = best_B + times[0]
        chosen_B = chosen_LB[layer]
        for size, time in zip(sizes[1:].tolist(), times[1:].tolist(), strict=True):
            if size > num_extras:
                break
            with_B = best_B[: num_extras + 1 - size] + time
            is_better = with_B < new_B[size:]
            np.copyto(new_B[size:], with_B, where=is_better)
            np.copyto(chosen_B[size:], size, where=is_better)
        best_B = new_B
    given_L = np.zeros(len(choices), dtype=np.int64)
    left = num_extras
    for layer in reversed(range(len(choices))):
        given_L[layer] = chosen_LB[layer, left]
        left -= int(given_L[layer])
    return given_L
