"""The instances that one process hosts: start, serve, drain, evict, with every byte accounted.

A function is `cold` until an instance is started; the instance is `starting` while its package is copied into
a row of an arena, `warm` while it serves, `draining` once it takes no new work. Starting and draining may run in a
control thread while the compute thread serves other instances.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from moeless.core.arrays import Int64Array
from moeless.core.errors import FunctionUnavailableError, MoelessError
from moeless.core.expert import FunctionId
from moeless.functions.arena import LayerArena, row_bytes
from moeless.functions.staging import Staging
from moeless.packages.packed_model import PackedModel


class InstanceState(StrEnum):
    COLD = "cold"
    STARTING = "starting"
    WARM = "warm"
    DRAINING = "draining"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """Counters since the pool began; bytes as of now."""

    cold_starts: int
    """Instances started from their package."""
    warm_starts: int
    """Calls of a function that found its instance warm."""
    evictions: int
    """Instances that gave their memory back: drained, idle, or to make room."""
    resident_bytes: int
    num_instances: int


@dataclass(slots=True)
class _Instance:
    function: FunctionId
    row: int
    state: InstanceState = InstanceState.STARTING


class InstancePool:
    """Hosts instances of one packed model's functions on one device.

    Args:
        packed: where the packages are.
        device, dtype: what the instances compute on and in.
        capacity_bytes: most bytes that instances may hold; a start beyond it evicts the instances that idled longest.
            None means no limit on the CPU; a GPU needs one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        packed: PackedModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype,
        capacity_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.packed = packed
        self.device = torch.device(device)
        self.dtype = dtype
        self.num_layers = packed.manifest.num_moe_layers
        self.num_experts = [0] * self.num_layers
        for function in packed.functions:
            self.num_experts[function.layer] = max(self.num_experts[function.layer], function.expert + 1)
        on_gpu = self.device.type == "cuda"
        self._staging = Staging(self.device) if on_gpu else None
        self._read_dtype = None if on_gpu else dtype  # a GPU converts what it was given, and faster
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._arenas: dict[int, LayerArena] = {}
        self._free_rows: dict[int, list[int]] = {}
        self._instances: dict[FunctionId, _Instance] = {}
        self._changed = threading.Condition(threading.RLock())
        self._resident_bytes = 0
        self._cold_starts = 0
        self._warm_starts = 0
        self._evictions = 0
        self.arena_rows_LE = [np.full(num, -1, dtype=np.int64) for num in self.num_experts]
        """Row of each expert's instance, per layer; -1 where there is none. Stable while the instance is held."""
        self._warm_LE = [np.zeros(num, dtype=bool) for num in self.num_experts]
        self.tokens_LE = [np.zeros(num, dtype=np.int64) for num in self.num_experts]
        """Tokens served by each function, as far as the host has counted them."""
        self._device_tokens_E: dict[int, torch.Tensor] = {}
        self._in_flight_LE = [np.zeros(num, dtype=np.int64) for num in self.num_experts]
        self._last_used_s_LE = [np.zeros(num) for num in self.num_experts]

    # ---- starting -------------------------------------------------------------------------------------------

    def start(self, function: FunctionId) -> bool:
        """Make `function` warm; returns whether that took a cold start.

        Raises: ChecksumError or PackageError for a bad package; FunctionUnavailableError if it does not fit.
        """
        with self._changed:
            while (instance := self._instances.get(function)) is not None:
                if instance.state is InstanceState.WARM:
                    return False
                self._changed.wait()
            instance = self._reserve(function)
        try:
            weights = self.packed.read_function(function, dtype=self._read_dtype, device="cpu")
            self._arenas[function.layer].write(instance.row, weights)
        except BaseException:
            with self._changed:
                self._forget(instance)
            raise
        with self._changed:
            self._cold_starts += 1
            self._set_warm(instance)
        return True

    def start_many(self, functions: Iterable[FunctionId]) -> int:
        """Start each of `functions`; returns the number of cold starts."""
        return sum(self.start(function) for function in functions)

    def _set_warm(self, instance: _Instance) -> None:
        instance.state = InstanceState.WARM
        self._warm_LE[instance.function.layer][instance.function.expert] = True
        self._changed.notify_all()

    def _reserve(self, function: FunctionId) -> _Instance:
        layer = function.layer
        if not (0 <= layer < self.num_layers and 0 <= function.expert < self.num_experts[layer]):
            raise FunctionUnavailableError(f"function {function} does not exist in {self.packed.manifest.model_id}")
        arena = self._arenas.get(layer) or self._make_arena(layer)
        if self._capacity_bytes is not None:
            self._make_room(arena.row_bytes, function)
        free = self._free_rows[layer]
        if not free:
            self._evict_longest_idle(function, layer=layer)
        row = function.expert if self.device.type == "cpu" else free[-1]
        free.remove(row)
        instance = _Instance(function, row)
        self._instances[function] = instance
        self.arena_rows_LE[layer][function.expert] = row
        self._last_used_s_LE[layer][function.expert] = self._clock()
        self._resident_bytes += arena.row_bytes
        return instance

    def _make_arena(self, layer: int) -> LayerArena:
        layout = self.packed.layout(layer)
        num_rows = self.num_experts[layer]
        if self.device.type != "cpu" and self._capacity_bytes is not None:
            layouts = (self.packed.layout(each) for each in range(self.num_layers))
            whole_model = sum(
                num * row_bytes(each, self.dtype) for num, each in zip(self.num_experts, layouts, strict=True)
            )
            num_rows = max(1, min(num_rows, num_rows * self._capacity_bytes // whole_model))
        arena = LayerArena(layout, num_rows=num_rows, dtype=self.dtype, device=self.device, staging=self._staging)
        self._arenas[layer] = arena
        self._free_rows[layer] = list(range(num_rows))[::-1]
        return arena

    def _make_room(self, num_bytes: int, function: FunctionId) -> None:
        assert self._capacity_bytes is not None
        while self._resident_bytes + num_bytes > self._capacity_bytes:
            self._evict_longest_idle(function)

    def _evict_longest_idle(self, wanted: FunctionId, *, layer: int | None = None) -> None:
        idle = [i for i in self._idle_instances() if layer in (None, i.function.layer)]
        if not idle:
            needed = self._arenas[wanted.layer].row_bytes
            raise FunctionUnavailableError(
                f"function {wanted} needs {needed} bytes and does not fit: the pool may hold {self._capacity_bytes}, "
                f"and busy instances hold {self._resident_bytes}"
            )
        victim = min(idle, key=lambda i: (self._last_used_s(i.function), i.function))
        self._forget(victim)
        self._evictions += 1

    def _idle_instances(self) -> list[_Instance]:
        return [
            instance
            for (layer, expert), instance in self._instances.items()
            if instance.state is InstanceState.WARM and self._in_flight_LE[layer][expert] == 0
        ]

    def _last_used_s(self, function: FunctionId) -> float:
        return float(self._last_used_s_LE[function.layer][function.expert])

    # ---- stopping -------------------------------------------------------------------------------------------

    def drain(self, function: FunctionId, *, timeout_s: float = 10.0) -> bool:
        """Take no new work, let running calls finish, then evict. Returns False if there was no warm instance.

        Raises: MoelessError if calls still run after `timeout_s`; the instance is warm again then.
        """
        with self._changed:
            instance = self._instances.get(function)
            if instance is None or instance.state is not InstanceState.WARM:
                return False
            instance.state = InstanceState.DRAINING
            self._warm_LE[function.layer][function.expert] = False
            in_flight_E = self._in_flight_LE[function.layer]
            if not self._changed.wait_for(lambda: in_flight_E[function.expert] == 0, timeout_s):
                self._set_warm(instance)
                raise MoelessError(
                    f"function {function} still has {in_flight_E[function.expert]} calls after {timeout_s} s"
                )
            self._forget(instance)
            self._evictions += 1
            return True

    def evict_idle(self, *, keep_alive_s: float, keep: frozenset[FunctionId] = frozenset()) -> list[FunctionId]:
        """Evict every instance that served nothing for `keep_alive_s` seconds, except those in `keep`."""
        with self._changed:
            limit_s = self._clock() - keep_alive_s
            victims = [
                instance
                for instance in self._idle_instances()
                if instance.function not in keep and self._last_used_s(instance.function) <= limit_s
            ]
            for victim in victims:
                self._forget(victim)
            self._evictions += len(victims)
            return [victim.function for victim in victims]

    def _forget(self, instance: _Instance) -> None:
        layer, expert = instance.function
        self.arena_rows_LE[layer][expert] = -1
        self._warm_LE[layer][expert] = False
        del self._instances[instance.function]
        self._arenas[layer].release(instance.row)
        self._free_rows[layer].append(instance.row)
        self._resident_bytes -= self._arenas[layer].row_bytes
        self._changed.notify_all()

    # ---- serving --------------------------------------------------------------------------------------------

    def acquire(self, layer: int, experts: Int64Array, *, is_call: bool = True) -> LayerArena:
        """Hold the instances of `experts` (distinct expert numbers), starting those that are cold.

        Each acquire needs a release. `is_call`: whether each of them is really called, and counted.

        Raises: what `start` raises; nothing is held then.
        """
        in_flight_E, warm_E = self._in_flight_LE[layer], self._warm_LE[layer]
        with self._changed:
            warm = warm_E[experts]
            if warm.all():
                in_flight_E[experts] += 1
                self._warm_starts += len(experts) * is_call
                return self._arenas[layer]
            held = experts[warm]
            in_flight_E[held] += 1
            self._warm_starts += len(held) * is_call
        try:
            for expert in experts[~warm].tolist():
                self._start_and_hold(FunctionId(layer, expert))
                held = np.append(held, expert)
        except BaseException:
            self.release(layer, held)
            raise
        return self._arenas[layer]

    def release(self, layer: int, experts: Int64Array) -> None:
        """Let go of what `acquire` held."""
        with self._changed:
            self._in_flight_LE[layer][experts] -= 1
            self._last_used_s_LE[layer][experts] = self._clock()
            self._changed.notify_all()

    def _start_and_hold(self, function: FunctionId) -> None:
        while True:
            self.start(function)
            with self._changed:  # it may have been evicted in between
                if self._warm_LE[function.layer][function.expert]:
                    self._in_flight_LE[function.layer][function.expert] += 1
                    return

    # ---- looking --------------------------------------------------------------------------------------------

    def state(self, function: FunctionId) -> InstanceState:
        instance = self._instances.get(function)
        return InstanceState.COLD if instance is None else instance.state

    def states(self) -> dict[FunctionId, InstanceState]:
        """Every function that has an instance here."""
        with self._changed:
            return {function: instance.state for function, instance in self._instances.items()}

    def instance_bytes(self, layer: int) -> int:
        """Bytes that one instance of `layer` holds; 0 while the layer has none."""
        arena = self._arenas.get(layer)
        return 0 if arena is None else arena.row_bytes

    def arena(self, layer: int) -> LayerArena:
        """The layer's stacked weights. Raises KeyError before the layer's first start."""
        return self._arenas[layer]

    def is_full(self, layer: int) -> bool:
        """Return whether every expert of `layer` is warm here."""
        return bool(self._warm_LE[layer].all())

    def count_on_device(self, layer: int, experts_Tk: torch.Tensor) -> None:
        """Count tokens served without taking the routing to the host."""
        if layer not in self._device_tokens_E:
            size = self.num_experts[layer]
            self._device_tokens_E[layer] = torch.zeros(size, dtype=torch.int64, device=experts_Tk.device)
        experts_n = experts_Tk.reshape(-1)
        self._device_tokens_E[layer].index_add_(0, experts_n, torch.ones_like(experts_n, dtype=torch.int64))

    def tokens_served(self, layer: int) -> Int64Array:
        """Tokens that each function of `layer` served here; waits for the device if it counted some."""
        on_device = self._device_tokens_E.get(layer)
        tokens_E = self.tokens_LE[layer].copy()
        return tokens_E if on_device is None else tokens_E + on_device.cpu().numpy()

    def stats(self) -> PoolStats:
        with self._changed:
            return PoolStats(
                cold_starts=self._cold_starts,
                warm_starts=self._warm_starts,
                evictions=self._evictions,
                resident_bytes=self._resident_bytes,
                num_instances=len(self._instances),
            )
