"""Affinity-aware placement: a plan changed so that tokens touch fewer workers, or hop less between layers.

Called by planning.planner, benchmarks and who plans offline. A local search over all layers (affinity.search):

1. The best step of any layer first, until none is left or the moves are spent.
2. Without a bound on moves, the same again from the start with a price on load above the bound instead, which rises
   until it forbids it: what is far better often lies behind placements that are out of balance. Layers that end out of
   balance go back to what step 1 found. For hops, layers are first searched one after the other, each given the one
   before. The better of both counts.
3. If asked, kicks: instances of a layer are swapped at random and the search goes on from there as in step 2, which
   is kept where it ends better (iterated local search).

Shapes: L layers, E experts, W workers, N instances.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import check_same_model, hops, touched
from moeless.planning.affinity.search import HopsCost, LayerBounds, LayerSearch, Step, WorkersCost, bounds_of
from moeless.planning.affinity.statistics import AffinityStatistics
from moeless.planning.load_check import check_load

Objective = Literal["workers", "hops"]

_PRICES = (0.2, 0.6, 2.0, 6.0, 20.0, 200.0)
"""Prices of a load above the bound by the mean worker's load, as multiples of the mean worker's share of the cost."""
_KICK_SWAPS = 6
"""Enough that the descent does not undo them one by one, few enough to keep what was good."""
_KICK_PRICES = _PRICES[1:]
"""Dearer from the beginning than those of a search from the start, which would undo all that was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AffinityConfig:
    """Objective of the search and its bounds."""

    objective: Objective = "workers"
    """Workers that a token touches in a layer (a hub, as moeless serves), or pairs of experts in consecutive layers on
    different workers (all-to-all expert parallelism)."""
    max_imbalance: float = 1.05
    """Busiest worker over mean, by load / speed, of each layer; where the start has more, no more than it has."""
    max_instances: int | None = None
    """Instances of one layer on one worker; a worker that starts with more keeps that number as its bound. None: the
    number on the start's fullest worker."""
    max_moves: int | None = None
    """Instances that may leave their worker. None: all."""
    min_gain: float = 0.0
    """With `max_moves`: what each moved instance must lower the cost by at least, as a share of a layer's mean cost at
    the start, so that no instance is started for a tiny gain."""
    num_kicks: int = 0
    """Tries to leave local optima: of each layer, for plans made offline. With `max_moves` there are none."""
    seed: int = 0
    """Seed of the random kicks."""

    def __post_init__(self) -> None:
        if self.objective not in ("workers", "hops"):
            raise ConfigError(f"affinity.objective must be workers or hops, got {self.objective!r}")
        if not self.max_imbalance >= 1:
            raise ConfigError(f"affinity.max_imbalance must be at least 1, got {self.max_imbalance}")
        if not self.min_gain >= 0:
            raise ConfigError(f"affinity.min_gain must be at least 0, got {self.min_gain}")
        for name, value, least in (
            ("max_instances", self.max_instances, 1),
            ("max_moves", self.max_moves, 0),
            ("num_kicks", self.num_kicks, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"affinity.{name} must be at least {least}, got {value}")


def place_by_affinity(
    start: Plan,
    statistics: AffinityStatistics,
    load_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    *,
    config: AffinityConfig | None = None,
) -> Plan:
    """Move instances of `start`, a balanced placement or the plan in force, to where tokens go anyway.

    Every instance keeps its share of its function's tokens, and so every function its instances' number. Tokens of
    functions without an instance go to no worker.

    Args:
        load_LE: tokens that the plan is for, >= 0: what the bound on imbalance is of.
    Returns: a plan that costs no more than `start`, keeps to the bounds, and has a higher version; `start` itself where
        nothing was found.
    Raises: ConfigError if plan, routing, load and cluster are not of one shape.
    """
    config = config or AffinityConfig()
    check_same_model(start, statistics)
    check_load("load_LE", load_LE, (start.num_layers, start.num_experts))
    if start.num_workers != cluster.num_workers:
        raise ConfigError(f"start must be a plan for {cluster.num_workers} workers, got one for {start.num_workers}")
    search = _PlanSearch(start, statistics, load_LE, cluster, model, config)
    begun = search.copy() if config.max_moves is None else None
    search.descend(max_moves=config.max_moves, min_gain=config.min_gain)
    if begun is not None:
        relaxed = begun.relaxed(search)
        search = relaxed if relaxed.cost < search.cost else search
        rng = np.random.default_rng(config.seed)
        for _ in range(config.num_kicks):
            for layer in range(start.num_layers):
                search = search.kicked(layer, rng)
    return moved_plan(start, search.worker_N())


def layer_spans(plan: Plan) -> list[slice]:
    """Return each layer's range among the plan's instances."""
    starts = np.searchsorted(plan.layer_N, np.arange(plan.num_layers + 1)).tolist()
    return [slice(begin, end) for begin, end in pairwise(starts)]


def layer_bounds(start: Plan, load_LE: FloatArray, speed_W: FloatArray, config: AffinityConfig) -> list[LayerBounds]:
    """Return each layer's bounds, which `start` keeps too; the workers' memory is bounded elsewhere."""
    found = []
    for layer, span in enumerate(layer_spans(start)):
        worker_n = start.worker_N[span]
        fullest = int(np.bincount(worker_n, minlength=1).max())
        found.append(
            bounds_of(
                load_LE[layer],
                worker_n,
                load_LE[layer, start.expert_N[span]] * start.share_N[span],
                speed_W,
                max_imbalance=config.max_imbalance,
                max_instances_W=np.full(start.num_workers, config.max_instances or fullest),
            )
        )
    return found


def moved_plan(start: Plan, worker_N: IntArray) -> Plan:
    """The start's instances on other workers, with its shares; itself if none moved."""
    if np.array_equal(worker_N, start.worker_N):
        return start
    return Plan.from_instances(
        version=start.version + 1,
        num_layers=start.num_layers,
        num_experts=start.num_experts,
        num_workers=start.num_workers,
        layer_N=start.layer_N,
        expert_N=start.expert_N,
        worker_N=worker_N,
        share_N=start.share_N,
    )


class _PlanSearch:
    """The searches of all layers, and for each its best step as long as that is up to date."""

    def __init__(
        self,
        start: Plan,
        statistics: AffinityStatistics,
        load_LE: FloatArray,
        cluster: Cluster,
        model: ModelShape,
        config: AffinityConfig,
    ) -> None:
        self._statistics = statistics
        self._is_hops = config.objective == "hops"
        self._fair_cost = (2 if self._is_hops else statistics.top_k) / start.num_workers
        self._spare_W: IntArray = cluster.capacity_W(model) - np.bincount(start.worker_N, minlength=start.num_workers)
        _, shares_LEW = start.dense()
        self._layers: list[LayerSearch] = []
        bounds = layer_bounds(start, load_LE, cluster.speed_W, config)
        for layer, span in enumerate(layer_spans(start)):
            cost = (
                HopsCost(np.zeros(shares_LEW.shape[1:]))
                if self._is_hops
                else WorkersCost(statistics.sets[layer], shares_LEW[layer])
            )
            self._layers.append(
                LayerSearch(start.expert_N[span], start.worker_N[span], start.share_N[span], bounds[layer], cost)
            )
        self._own = set(range(start.num_layers))
        """Layers that are not shared with the search that this one is a copy of."""
        self._steps: list[Step | None] = [None] * start.num_layers
        self._stale = set(range(start.num_layers))
        self.cost = self._whole_cost()

    def worker_N(self) -> IntArray:
        """Current worker of each of the start's instances."""
        return np.concatenate([layer.worker_n for layer in self._layers])

    def copy(self) -> _PlanSearch:
        """Copy the current state; layers are copied once they change."""
        other = object.__new__(_PlanSearch)
        other.__dict__ = dict(self.__dict__)
        self._own, other._own = set(), set()
        other._layers, other._steps, other._stale = self._layers.copy(), self._steps.copy(), self._stale.copy()
        return other

    def descend(self, *, max_moves: int | None = None, min_gain: float = 0.0) -> None:
        """Best step of any layer first, until none lowers the cost or the moves are spent."""
        threshold = 0.0 if max_moves is None else min_gain * self.cost / max(len(self._layers), 1)
        while True:
            left = None if max_moves is None else max_moves - sum(layer.num_moved for layer in self._layers)
            if left is not None and left < 2:
                self._spoil(*range(len(self._layers)))  # steps that are known may be larger than that
            for layer in sorted(self._stale):
                self._steps[layer] = self._best_step(layer, left)
            self._stale = set()
            found = [(step.change / len(step.moves), layer) for layer, step in enumerate(self._steps) if step]
            if not found or -min(found)[0] < threshold:
                return
            self._apply(min(found)[1])

    def relaxed(self, fallback: _PlanSearch) -> _PlanSearch:
        """Search through unbalanced placements; layers that end unbalanced are taken from `fallback`."""
        other = self.copy()
        if self._is_hops:
            for layer in range(1, len(self._layers)):
                for price in _PRICES:
                    other._priced(layer, price)
                    other._descend_layer(layer)
        for price in _PRICES:
            for layer in range(len(self._layers)):
                other._priced(layer, price)
            other.descend()
        for layer, search in enumerate(other._layers):
            if not search.is_within_bounds:
                other._place(layer, fallback._layers[layer].worker_n)
        if (other._spare_W < 0).any():
            return fallback
        for layer in range(len(self._layers)):
            other._priced(layer, np.inf)
        other.cost = other._whole_cost()
        other.descend()
        return other

    def kicked(self, layer: int, rng: np.random.Generator) -> _PlanSearch:
        """The search after random swaps in a layer and a priced descent from there; itself if that is no better."""
        other = self.copy()
        around = other._around(layer)
        other._priced(layer, _KICK_PRICES[0])
        other._owned(layer).shake(rng, num_swaps=_KICK_SWAPS)
        for price in (*_KICK_PRICES, np.inf):
            for near in around:
                other._priced(near, price)
            if np.isinf(price) and not all(other._layers[near].is_within_bounds for near in around):
                return self
            other.descend()
        other.cost = (
            other._whole_cost() if self._is_hops else self.cost + other._layer_cost(layer) - self._layer_cost(layer)
        )
        return other if other.cost < self.cost - 1e-9 else self

    def _descend_layer(self, layer: int) -> None:
        """Given the layer before alone."""
        while (step := self._best_step(layer, None, is_forward=True)) is not None:
            self._steps[layer] = step
            self._apply(layer)

    def _best_step(self, layer: int, left: int | None, *, is_forward: bool = False) -> Step | None:
        search = self._owned(layer) if self._is_hops else self._layers[layer]
        if self._is_hops:
            search.cost = HopsCost(self._kept_EW(layer, is_forward=is_forward))
        return search.best_step(spare_W=self._spare_W, max_moved=None if left is None else search.num_moved + left)

    def _apply(self, layer: int) -> None:
        step, search = self._steps[layer], self._owned(layer)
        assert step is not None  # chosen among those there are
        before_W = search.hosted_W.copy()
        search.apply(step)
        self.cost += step.change
        self._spare_W = self._spare_W + before_W - search.hosted_W
        self._spoil_around(layer)
        for other, known in enumerate(self._steps):
            if known is not None and len(known.moves) == 1 and self._spare_W[known.moves[0][1]] <= 0:
                self._stale.add(other)

    def _place(self, layer: int, worker_n: IntArray) -> None:
        search = self._owned(layer)
        before_W = search.hosted_W.copy()
        search.place(worker_n)
        self._spare_W = self._spare_W + before_W - search.hosted_W
        self._spoil_around(layer)

    def _priced(self, layer: int, price: float) -> None:
        self._owned(layer).price = price * self._fair_cost
        self._spoil(layer)

    def _owned(self, layer: int) -> LayerSearch:
        if layer not in self._own:
            self._layers[layer] = self._layers[layer].copy()
            self._own.add(layer)
        return self._layers[layer]

    def _spoil_around(self, layer: int) -> None:
        """The layer changed: what was known of it, and where hops count of its neighbours, is out of date."""
        self._spoil(*self._around(layer))

    def _spoil(self, *layers: int) -> None:
        self._stale |= set(layers)

    def _around(self, layer: int) -> list[int]:
        """The layers whose cost depends on this one's placement."""
        return [
            near
            for near in range(layer - 1, layer + 2)
            if near == layer or (self._is_hops and 0 <= near < len(self._layers))
        ]

    def _kept_EW(self, layer: int, *, is_forward: bool) -> FloatArray:
        """Pairs kept on one worker, with the neighbours as they are, if an expert's tokens were all computed there."""
        transitions_LEE = self._statistics.transitions_LEE
        kept_EW: FloatArray = np.zeros_like(self._layers[layer].shares_EW)
        if layer > 0:
            kept_EW += transitions_LEE[layer - 1].T @ self._layers[layer - 1].shares_EW
        if layer + 1 < len(self._layers) and not is_forward:
            kept_EW += transitions_LEE[layer] @ self._layers[layer + 1].shares_EW
        return kept_EW

    def _whole_cost(self) -> float:
        """Sum over layers, of workers touched or of hops."""
        if not self._is_hops:
            return sum(self._layer_cost(layer) for layer in range(len(self._layers)))
        shares = [layer.shares_EW for layer in self._layers]
        transitions = self._statistics.transitions_LEE
        return sum(hops(one, other, pairs) for one, other, pairs in zip(shares, shares[1:], transitions, strict=False))

    def _layer_cost(self, layer: int) -> float:
        """Workers touched in a layer."""
        return touched(self._layers[layer].shares_EW, self._statistics.sets[layer])
