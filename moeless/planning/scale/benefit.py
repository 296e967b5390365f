"""One budget of replicas for all layers, spent where it shortens the slowest worker's time the most.

Shapes: L MoE layers, E experts per layer, B extra replicas to spend, X extras of all layers, Y numbers of extras of all
layers (0 included).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.planning.load_check import check_load
from moeless.planning.scale.replicas import Extras, Limits, extras_in_order


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

    A layer takes as long as its slowest worker. Heaviest-first placing keeps that worker within the mean work of the
    workers and (1 − 1/W) times the heaviest replica (Graham's bound), so what an extra is worth is the drop of this
    bound. An extra relieves the heaviest replica, and costs where a call's time does not fall with its tokens: two
    replicas read their weights twice. The worth is not concave in the extras (of two equally hot experts, relieving
    one is worth nothing), so no greedy rule is exact: this is a multiple-choice knapsack, solved exactly by dynamic
    programming over layers. Of equally good choices it takes the one with fewer instances in later layers.

    Exact for this bound if the seconds of a token never rise with the tokens of a call.

    Args:
        load_LE: predicted tokens per step, shape (L, E), >= 0.
        num_extras: B; spent as far as it is worth anything.
        num_workers: W.
        worker_share: replicas with at most this share of the workers' mean load need no relief.
        seconds: time of calls by their tokens, never falling. Default: proportional.
    Returns: counts, shape (L, E).
    Source: the spending of a global budget is CRAFT's; there the benefit is found by replaying a trace.
    """
    check_load("load_LE", load_LE, limits.min_LE.shape)
    enough_L = worker_share * load_LE.sum(axis=1) / num_workers
    room_L = np.minimum(limits.budget_L - limits.min_LE.sum(axis=1), num_extras)
    extras = extras_in_order(load_LE, limits, room_L=room_L, enough_L=enough_L)
    choices = _choices(load_LE, limits, extras, num_workers, seconds or _proportional)
    given_L = _spend(choices, num_extras)
    return extras.counts_LE(limits.min_LE, extras.rank_X < given_L[extras.layer_X])


def _choices(
    load_LE: FloatArray, limits: Limits, extras: Extras, num_workers: int, seconds: Callable[[FloatArray], FloatArray]
) -> list[tuple[IntArray, FloatArray]]:
    """Return each layer's numbers of extras, rising from 0, and the times that fall with them."""
    layer_X, replicas_X = extras.layer_X, extras.replicas_X
    full_LE = extras.counts_LE(limits.min_LE, np.ones(len(layer_X), dtype=np.bool_))
    # The heaviest replica after some extras is the one whom the next would relieve, or one that none relieves.
    last_L = (load_LE / np.maximum(full_LE, 1)).max(axis=1, initial=0.0)
    min_LE = np.maximum(limits.min_LE, 1)
    work_L = (limits.min_LE * seconds(load_LE / min_LE)).sum(axis=1)
    before_s_X = seconds(extras.load_X)
    more_X = (replicas_X + 1) * seconds(extras.load_X * replicas_X / (replicas_X + 1)) - replicas_X * before_s_X

    # Flat arrays of one entry more for each layer: the state after x extras, x from 0.
    end_L = np.append(extras.start_L[1:], len(layer_X))
    layer_Y = np.insert(layer_X, end_L, np.arange(len(load_LE)))
    heaviest_Y = np.insert(np.maximum(before_s_X, seconds(last_L)[layer_X]), end_L, seconds(last_L))
    start_L = extras.start_L + np.arange(len(load_LE))
    sums = np.concatenate(([0.0], np.cumsum(more_X)))
    sums_Y = np.insert(sums[:-1], end_L, sums[end_L])
    work_Y = work_L[layer_Y] + sums_Y - sums_Y[start_L][layer_Y]
    time_Y = work_Y / num_workers + (1 - 1 / num_workers) * heaviest_Y
    choices = []
    for time_x in np.split(time_Y, start_L[1:]):
        lowest_x = np.minimum.accumulate(time_x)
        sizes = np.concatenate(([0], 1 + np.flatnonzero(np.diff(lowest_x) < -1e-12 * lowest_x[0])))
        choices.append((sizes, time_x[sizes]))
    return choices


def _proportional(tokens: FloatArray) -> FloatArray:
    return tokens


def _spend(choices: list[tuple[IntArray, FloatArray]], num_extras: int) -> IntArray:
    """Choose a size for each layer: the minimal sum of times with sizes that add up to at most `num_extras`.

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
