"""A plan: which worker hosts an instance of which function, and the share of the function's tokens it gets.

Made by planning, applied by control, replayed by simulate. Immutable; a newer plan has a higher version.

Shapes: L MoE layers, E experts per layer, W workers, N instances.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import BoolArray, FloatArray, IntArray, read_only
from moeless.core.call_cost import CallCost
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import InstanceShare, RoutingTable


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Instances in the order of (layer, expert, worker), at most one of a function on a worker.

    A plan takes its arrays over: they, and those computed from them, are read-only. `from_dense` and `from_instances`
    check them.
    """

    version: int
    num_layers: int
    num_experts: int
    num_workers: int
    layer_N: IntArray
    expert_N: IntArray
    worker_N: IntArray
    share_N: FloatArray
    """Share of the function's tokens, >= 0; the shares of a function's instances sum to 1. An instance with share 0 is
    kept warm for later."""

    def __post_init__(self) -> None:
        for array in (self.layer_N, self.expert_N, self.worker_N, self.share_N):
            read_only(array)

    @classmethod
    def from_instances(
        cls,
        *,
        version: int,
        num_layers: int,
        num_experts: int,
        num_workers: int,
        layer_N: IntArray,
        expert_N: IntArray,
        worker_N: IntArray,
        share_N: FloatArray,
    ) -> Self:
        """Sort and check. Raises ConfigError that names the function and the rule."""
        key_N = (layer_N.astype(np.int64) * num_experts + expert_N) * num_workers + worker_N
        order_N = np.argsort(key_N, kind="stable")
        plan = cls(
            version=version,
            num_layers=num_layers,
            num_experts=num_experts,
            num_workers=num_workers,
            layer_N=layer_N[order_N],
            expert_N=expert_N[order_N],
            worker_N=worker_N[order_N],
            share_N=share_N[order_N].astype(np.float64),
        )
        plan._check(key_N[order_N])
        return plan

    @classmethod
    def from_dense(cls, has_LEW: BoolArray, shares_LEW: FloatArray, *, version: int) -> Self:
        """Build from instances and shares, both of shape (L, E, W); shares without an instance are ignored."""
        layer_N, expert_N, worker_N = np.nonzero(has_LEW)
        num_layers, num_experts, num_workers = has_LEW.shape
        return cls.from_instances(
            version=version,
            num_layers=num_layers,
            num_experts=num_experts,
            num_workers=num_workers,
            layer_N=layer_N,
            expert_N=expert_N,
            worker_N=worker_N,
            share_N=shares_LEW[layer_N, expert_N, worker_N],
        )

    @property
    def num_instances(self) -> int:
        """N."""
        return len(self.layer_N)

    @cached_property
    def function_N(self) -> IntArray:
        """layer × E + expert."""
        function_N: IntArray = self.layer_N.astype(np.int64) * self.num_experts + self.expert_N
        read_only(function_N)
        return function_N

    @cached_property
    def keys_N(self) -> IntArray:
        """(layer × E + expert) × W + worker: the same in every plan of the same shape, ascending."""
        keys_N: IntArray = self.function_N * self.num_workers + self.worker_N
        read_only(keys_N)
        return keys_N

    @cached_property
    def layer_worker_N(self) -> IntArray:
        """layer × W + worker."""
        layer_worker_N: IntArray = self.layer_N.astype(np.int64) * self.num_workers + self.worker_N
        read_only(layer_worker_N)
        return layer_worker_N

    @cached_property
    def counts_LE(self) -> IntArray:
        """Replica count of each function, shape (L, E)."""
        counts = np.bincount(self.function_N, minlength=self.num_layers * self.num_experts)
        counts_LE = counts.reshape(self.num_layers, self.num_experts)
        read_only(counts_LE)
        return counts_LE

    @cached_property
    def hosted_LW(self) -> IntArray:
        """Instances of each layer on each worker, shape (L, W)."""
        hosted = np.bincount(self.layer_worker_N, minlength=self.num_layers * self.num_workers)
        hosted_LW = hosted.reshape(self.num_layers, self.num_workers)
        read_only(hosted_LW)
        return hosted_LW

    def with_version(self, version: int) -> Self:
        """The same under another version."""
        return self._with(version=version)

    def with_shares(self, share_N: FloatArray) -> Self:
        """The same instances with other shares, which are not checked but taken over: they become read-only."""
        read_only(share_N)
        return self._with(share_N=share_N)

    def _with(self, **fields: object) -> Self:
        """A copy, with what was computed of its instances: `dataclasses.replace` would compute it again."""
        plan = copy.copy(self)
        vars(plan).update(fields)
        return plan

    def dense(self) -> tuple[BoolArray, FloatArray]:
        """Return instances and their shares, both of shape (L, E, W)."""
        has_LEW = np.zeros((self.num_layers, self.num_experts, self.num_workers), dtype=np.bool_)
        shares_LEW = np.zeros(has_LEW.shape)
        has_LEW[self.layer_N, self.expert_N, self.worker_N] = True
        shares_LEW[self.layer_N, self.expert_N, self.worker_N] = self.share_N
        return has_LEW, shares_LEW

    def worker_load_LW(self, load_LE: FloatArray) -> FloatArray:
        """Tokens that each worker computes in each layer, shape (L, W), if the functions get `load_LE`."""
        if load_LE.shape != (self.num_layers, self.num_experts):
            raise ConfigError(
                f"load_LE must be of the plan's {(self.num_layers, self.num_experts)} layers and experts, got "
                f"{load_LE.shape}"
            )
        tokens_N = load_LE.ravel()[self.function_N] * self.share_N
        flat: NDArray[Any] = np.bincount(
            self.layer_worker_N, weights=tokens_N, minlength=self.num_layers * self.num_workers
        )
        load_LW: FloatArray = flat.reshape(self.num_layers, self.num_workers)
        return load_LW

    def has(self, keys: IntArray) -> BoolArray:
        """Return for each of `keys`, named as in `keys_N`, whether this plan has that instance."""
        if not self.num_instances:
            return np.zeros(keys.shape, dtype=np.bool_)
        is_here: BoolArray = self.keys_N.take(np.searchsorted(self.keys_N, keys), mode="clip") == keys
        return is_here

    def started_since(self, before: Plan) -> IntArray:
        """Indices of this plan's instances that `before` does not have: what has to be loaded."""
        return np.flatnonzero(~before.has(self.keys_N))

    def to_routing_table(self, workers: Sequence[str], *, step_cost: CallCost | None = None) -> RoutingTable:
        """Make the dispatcher's routing table, with the workers' names.

        Args:
            step_cost: see RoutingTable. Without it, instances without a share are left out.
        """
        instances: dict[FunctionId, list[InstanceShare]] = {}
        for layer, expert, worker, share in zip(
            self.layer_N.tolist(), self.expert_N.tolist(), self.worker_N.tolist(), self.share_N.tolist(), strict=True
        ):
            if share > 0 or step_cost is not None:
                instances.setdefault(FunctionId(layer, expert), []).append(InstanceShare(workers[worker], share))
        return RoutingTable(
            version=self.version,
            instances={function: tuple(shares) for function, shares in instances.items()},
            step_cost=step_cost,
        )

    def _check(self, key_N: IntArray) -> None:
        for name, index_N, limit in (
            ("layer", self.layer_N, self.num_layers),
            ("expert", self.expert_N, self.num_experts),
            ("worker", self.worker_N, self.num_workers),
        ):
            if len(index_N) and not (index_N.min() >= 0 and index_N.max() < limit):
                raise ConfigError(f"plan: {name} must be from 0 to {limit - 1}, got {index_N.min()} to {index_N.max()}")
        twice = np.flatnonzero(np.diff(key_N) == 0)
        if len(twice):
            raise ConfigError(
                f"plan: {self._name(twice[0])} must be on a worker once, got worker {self.worker_N[twice[0]]} twice"
            )
        if len(self.share_N) and not (np.isfinite(self.share_N).all() and self.share_N.min() >= 0):
            raise ConfigError(f"plan: shares must be finite and >= 0, got {self.share_N.min()}")
        function_N = key_N // self.num_workers
        starts = np.flatnonzero(np.diff(function_N, prepend=-1))
        sums = np.add.reduceat(self.share_N, starts) if len(starts) else np.empty(0)
        wrong = np.flatnonzero(np.abs(sums - 1) > 1e-6)
        if len(wrong):
            raise ConfigError(f"plan: shares of {self._name(starts[wrong[0]])} must sum to 1, got {sums[wrong[0]]:g}")

    def _name(self, index: int) -> FunctionId:
        return FunctionId(int(self.layer_N[index]), int(self.expert_N[index]))
