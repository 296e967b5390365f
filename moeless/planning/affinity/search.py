"""Local search in one layer: instances move or swap workers while that lowers the cost, within bounds.

Called by affinity.placing. What each step would change is known for all instances at once; after a step only what it
touched is computed anew.

The cost is linear in the shares of one expert. Let A[e, w] be what a token-share of expert e on worker w costs, the
others staying where they are. Moving an instance with share s from a to b changes the cost by s × (A[e, b] − A[e, a]).
Where experts of one set are swapped (e from a to b with share s, f from b to a with share t) both terms add up to too
little by s × t × (P[a, e, f] + P[b, e, f]), P being the tokens that chose both and find no third expert on the worker.

Shapes: E experts, W workers, U distinct sets, k experts per set, n instances, R sets that a step touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.planning.affinity.statistics import ExpertSets

_MIN_GAIN = 1e-9
"""Below it is rounding: costs are at most the number of experts per token."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LayerBounds:
    """Bounds of one layer's placement."""

    load_E: FloatArray
    """Load of each expert, in any unit."""
    max_load_W: FloatArray
    """Bound of each worker's load, in the same unit."""
    max_instances_W: IntArray
    """Bound of each worker's instances of this layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """Instances, where each goes, and what the cost changes by."""

    moves: tuple[tuple[int, int], ...]
    change: float


class WorkersCost:
    """Expected number of workers that a token touches."""

    def __init__(self, sets: ExpertSets, shares_EW: FloatArray) -> None:
        self._sets = sets
        num_experts, num_workers = shares_EW.shape
        every_set = np.arange(len(sets.weight_U))
        # A worker that none of a set's experts is on has what no worker would have without any shares.
        none_E = np.zeros(num_experts)
        self._pairs_WEE = np.repeat(self._pairs_EE(none_E, every_set)[np.newaxis], num_workers, axis=0)
        for worker, share_E in enumerate(shares_EW.T):
            rows_R = np.flatnonzero((share_E[sets.experts_Uk] > 0).any(axis=1))
            self._pairs_WEE[worker] += self._pairs_EE(share_E, rows_R) - self._pairs_EE(none_E, rows_R)
        self._has_UE = np.zeros((len(sets.weight_U), num_experts), dtype=np.bool_)
        self._has_UE[every_set[:, np.newaxis], sets.experts_Uk] = True

    @property
    def linear_EW(self) -> FloatArray:
        """A: tokens of an expert that no other of their experts brings to the worker."""
        linear_EW: FloatArray = np.diagonal(self._pairs_WEE, axis1=1, axis2=2).T
        return linear_EW

    def together_nn(self, expert_n: IntArray, worker_n: IntArray) -> FloatArray:
        """P[w_i, e_i, e_j] + P[w_j, e_i, e_j]."""
        one_nn = self._pairs_WEE[worker_n[:, np.newaxis], expert_n[:, np.newaxis], expert_n]
        together_nn: FloatArray = one_nn + one_nn.T
        return together_nn

    def update(self, before_EW: FloatArray, after_EW: FloatArray, experts: list[int], workers: list[int]) -> None:
        """The shares of these experts on these workers changed."""
        rows_R = np.flatnonzero(self._has_UE[:, experts].any(axis=1))
        for worker in workers:
            self._pairs_WEE[worker] += self._pairs_EE(after_EW[:, worker], rows_R)
            self._pairs_WEE[worker] -= self._pairs_EE(before_EW[:, worker], rows_R)

    def copy(self) -> WorkersCost:
        """Copy the current state."""
        other = object.__new__(WorkersCost)
        other._sets, other._has_UE, other._pairs_WEE = self._sets, self._has_UE, self._pairs_WEE.copy()
        return other

    def _pairs_EE(self, share_E: FloatArray, rows_R: IntArray) -> FloatArray:
        """P of one worker, from some of the sets; A on the diagonal."""
        experts_Rk = self._sets.experts_Uk[rows_R]
        missed_Rk = 1.0 - share_E[experts_Rk]
        # A product without one or two of its factors, of which some are zero.
        is_zero_Rk = missed_Rk < 1e-12
        factor_Rk: FloatArray = np.where(is_zero_Rk, 1.0, missed_Rk)
        is_other_kk = ~np.eye(experts_Rk.shape[1], dtype=np.bool_)
        zeros_Rkk = is_zero_Rk[:, :, np.newaxis].astype(np.int64) + (is_other_kk & is_zero_Rk[:, np.newaxis, :])
        left_out_Rkk = factor_Rk[:, :, np.newaxis] * np.where(is_other_kk, factor_Rk[:, np.newaxis, :], 1.0)
        product_R = self._sets.weight_U[rows_R] * factor_Rk.prod(axis=1)
        value_Rkk = product_R[:, np.newaxis, np.newaxis] / left_out_Rkk
        value_Rkk[is_zero_Rk.sum(axis=1)[:, np.newaxis, np.newaxis] > zeros_Rkk] = 0.0
        key_Rkk = experts_Rk[:, :, np.newaxis] * len(share_E) + experts_Rk[:, np.newaxis, :]
        flat = np.bincount(key_Rkk.reshape(-1), value_Rkk.reshape(-1), len(share_E) ** 2)
        pairs_EE: FloatArray = flat.reshape(len(share_E), -1).astype(np.float64)
        return pairs_EE


class HopsCost:
    """Minus the pairs that a layer keeps on one worker with the layers before and after, which stay."""

    def __init__(self, kept_EW: FloatArray) -> None:
        """Args: kept_EW: pairs kept if all of an expert's tokens were computed on a worker."""
        self.linear_EW = -kept_EW

    def together_nn(self, expert_n: IntArray, worker_n: IntArray) -> FloatArray:
        """Experts of one layer do not hop to one another."""
        return np.zeros((len(expert_n), len(worker_n)))

    def update(self, before_EW: FloatArray, after_EW: FloatArray, experts: list[int], workers: list[int]) -> None:
        """Depends on other layers alone."""

    def copy(self) -> HopsCost:
        """Itself: it never changes."""
        return self


class LayerSearch:
    """The instances of one layer while they are searched; their shares travel with them."""

    def __init__(
        self,
        expert_n: IntArray,
        worker_n: IntArray,
        share_n: FloatArray,
        bounds: LayerBounds,
        cost: WorkersCost | HopsCost,
    ) -> None:
        """Takes a placement that keeps to the bounds; it is what moves are counted from."""
        self.expert_n, self.share_n = expert_n, share_n
        self.worker_n = worker_n.copy()
        self.change = 0.0
        """Change of the cost since the start."""
        self.price = np.inf
        """Price of exceeding a worker's bound on load by the mean worker's load; infinite: no step may exceed it."""
        self._bounds = bounds
        self.cost = cost
        self._home_n = worker_n.copy()
        self._tokens_n = bounds.load_E[expert_n] * share_n
        self._slack = 1e-9 * float(bounds.load_E.sum())
        self._mean_load = max(float(self._tokens_n.sum()) / len(bounds.max_load_W), 1e-300)
        num_workers = len(bounds.max_load_W)
        self.shares_EW = np.zeros((len(bounds.load_E), num_workers))
        self._hosts_EW = np.zeros(self.shares_EW.shape, dtype=np.bool_)
        self.shares_EW[expert_n, worker_n] = share_n
        self._hosts_EW[expert_n, worker_n] = True
        self._load_W: FloatArray = np.bincount(worker_n, self._tokens_n, num_workers).astype(np.float64)
        self.hosted_W: IntArray = np.bincount(worker_n, minlength=num_workers)

    @property
    def is_within_bounds(self) -> bool:
        """Return whether every worker is within its bounds of load and instances."""
        is_busy = (self._load_W > self._bounds.max_load_W + 2 * self._slack).any()
        return not is_busy and not (self.hosted_W > self._bounds.max_instances_W).any()

    @property
    def num_moved(self) -> int:
        """Instances that are not where they were at the start."""
        return int(np.count_nonzero(self.worker_n != self._home_n))

    def best_step(self, *, spare_W: IntArray, max_moved: int | None = None) -> Step | None:
        """Find the step with the largest saving per instance moved; None if no step saves.

        Args:
            spare_W: instances of any layer that still fit each worker's memory.
            max_moved: instances that may be away from their start afterwards; None: all.
        """
        if not len(self.expert_n):
            return None
        change_nW = self._move_changes_nW(spare_W)
        steps = [self._best_of(change_nW, self._away_nW(), max_moved, is_swap=False)]
        change_nn = self._swap_changes_nn()
        steps.append(self._best_of(change_nn, self._swapped_away_nn(), max_moved, is_swap=True))
        best = min(steps, key=lambda step: step.change / len(step.moves))
        return best if best.change < -_MIN_GAIN else None

    def apply(self, step: Step) -> None:
        """Make the step."""
        before_EW = self.shares_EW.copy()
        index_m, target_m = (np.array(column) for column in zip(*step.moves, strict=True))
        source_m, expert_m = self.worker_n[index_m], self.expert_n[index_m]
        for worker_m, sign in ((source_m, -1), (target_m, 1)):
            self._hosts_EW[expert_m, worker_m] = sign > 0
            self.shares_EW[expert_m, worker_m] = self.share_n[index_m] if sign > 0 else 0.0
            np.add.at(self._load_W, worker_m, sign * self._tokens_n[index_m])
            np.add.at(self.hosted_W, worker_m, sign)
        self.worker_n[index_m] = target_m
        self.change += step.change
        self.cost.update(before_EW, self.shares_EW, expert_m.tolist(), np.unique([source_m, target_m]).tolist())

    def place(self, worker_n: IntArray) -> None:
        """Put every instance where it is said, whatever it costs."""
        index_m = np.flatnonzero(self.worker_n != worker_n)
        if len(index_m):
            self.apply(Step(tuple(zip(index_m.tolist(), worker_n[index_m].tolist(), strict=True)), 0.0))

    def shake(self, rng: np.random.Generator, *, num_swaps: int) -> None:
        """Swap instances at random, within the bounds."""
        for _ in range(num_swaps):
            change_nn = self._swap_changes_nn()
            open_pairs = np.flatnonzero(np.isfinite(change_nn))
            if not len(open_pairs):
                return
            one, other = divmod(int(rng.choice(open_pairs)), len(change_nn))
            self.apply(self._swap(one, other, float(change_nn[one, other])))

    def copy(self) -> LayerSearch:
        """Copy the current state, to come back to it later."""
        other = object.__new__(LayerSearch)
        other.__dict__ = {
            name: value.copy() if isinstance(value, (np.ndarray, WorkersCost)) else value
            for name, value in self.__dict__.items()
        }
        return other

    def _move_changes_nW(self, spare_W: IntArray) -> FloatArray:
        linear_nW = self.cost.linear_EW[self.expert_n]
        own_n1 = np.take_along_axis(linear_nW, self.worker_n[:, np.newaxis], axis=1)
        change_nW: FloatArray = self.share_n[:, np.newaxis] * (linear_nW - own_n1)
        is_full_W = (self.hosted_W >= self._bounds.max_instances_W) | (spare_W <= 0)
        change_nW[self._hosts_EW[self.expert_n] | is_full_W] = np.inf
        change_nW += self._charge(np.arange(len(self._load_W)), self._tokens_n[:, np.newaxis])
        change_nW += self._charge(self.worker_n, -self._tokens_n)[:, np.newaxis]
        return change_nW

    def _swap_changes_nn(self) -> FloatArray:
        linear_nW = self.cost.linear_EW[self.expert_n]
        own_n1 = np.take_along_axis(linear_nW, self.worker_n[:, np.newaxis], axis=1)
        one_nn = self.share_n[:, np.newaxis] * (linear_nW[:, self.worker_n] - own_n1)
        both_nn = self.share_n[:, np.newaxis] * self.share_n
        change_nn: FloatArray = one_nn + one_nn.T + both_nn * self.cost.together_nn(self.expert_n, self.worker_n)
        gets_nn = self._tokens_n[:, np.newaxis] - self._tokens_n  # what the other's worker gets more
        charge_nn = self._charge(self.worker_n, gets_nn)
        change_nn += charge_nn + charge_nn.T
        closed_nn = self._hosts_EW[self.expert_n][:, self.worker_n]
        change_nn[closed_nn | closed_nn.T] = np.inf
        return change_nn

    def _charge(self, workers: IntArray, more: FloatArray) -> FloatArray:
        """Return the price of the excess load if these workers (the last axis) get `more` tokens."""
        load, most = self._load_W[workers], self._bounds.max_load_W[workers]
        if np.isinf(self.price):
            return np.where((load + more > most + self._slack) & (more > 0), np.inf, 0.0)
        charge: FloatArray = np.maximum(load + more - most, 0.0) - np.maximum(load - most, 0.0)
        return charge * (self.price / self._mean_load)

    def _away_nW(self) -> IntArray:
        """Return by how many instances each move raises the number that are away from their start."""
        is_away_nW = np.arange(len(self._load_W)) != self._home_n[:, np.newaxis]
        away_nW: IntArray = is_away_nW.astype(np.int64) - (self.worker_n != self._home_n)[:, np.newaxis]
        return away_nW

    def _swapped_away_nn(self) -> IntArray:
        away_nn = self._away_nW()[:, self.worker_n]
        both_nn: IntArray = away_nn + away_nn.T
        return both_nn

    def _best_of(self, change: FloatArray, away: IntArray, max_moved: int | None, *, is_swap: bool) -> Step:
        if max_moved is not None:
            change = np.where(self.num_moved + away <= max_moved, change, np.inf)
        one, other = divmod(int(np.argmin(change)), change.shape[1])
        best = float(change[one, other])
        return self._swap(one, other, best) if is_swap else Step(((one, other),), best)

    def _swap(self, one: int, other: int, change: float) -> Step:
        return Step(((one, int(self.worker_n[other])), (other, int(self.worker_n[one]))), change)


def bounds_of(
    load_E: FloatArray,
    worker_n: IntArray,
    tokens_n: FloatArray,
    speed_W: FloatArray,
    *,
    max_imbalance: float,
    max_instances_W: IntArray,
) -> LayerBounds:
    """Bounds that the start keeps to: where it is less balanced than `max_imbalance`, no worse than it is."""
    load_W = np.bincount(worker_n, tokens_n, len(speed_W))
    level = max(max_imbalance * tokens_n.sum() / speed_W.sum(), float((load_W / speed_W).max()))
    hosted_W = np.bincount(worker_n, minlength=len(speed_W))
    return LayerBounds(load_E=load_E, max_load_W=level * speed_W, max_instances_W=np.maximum(max_instances_W, hosted_W))
