"""Takes a layer's routing to the instances and brings the weighted sum back: the heart of the token path.

One call of `forward` per MoE layer, from the engine's compute thread: look up the table, group the pairs by worker,
send to all workers, compute the local part while they work, collect in worker order, retry what failed, add up.

Shapes: T tokens, k experts per token, E experts, H hidden, R rows of one worker, n pairs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from moeless.core.arrays import Float32Array, Int64Array
from moeless.core.errors import FunctionUnavailableError, TransportError, WorkerStartingError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, RoutingTable
from moeless.dispatch.channel import Channel
from moeless.dispatch.config import DispatchConfig
from moeless.dispatch.grouping import CompiledLayer, WorkerGroup, compile_layer, group_by_worker, regroup_elsewhere
from moeless.dispatch.metrics import DispatchMetrics
from moeless.dispatch.wire import LayerCall
from moeless.functions.feed_forward import FeedForward
from moeless.planning.step_balance import warm_up

logger = logging.getLogger(__name__)


class LayerObserver(Protocol):
    """Receives each layer's routing."""

    @property
    def is_watching(self) -> bool:
        """Whether to call `observe_layer`; read once a layer."""
        ...

    def observe_layer(
        self, layer: int, hidden_TH: torch.Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array
    ) -> None:
        """Called while workers compute the layer, or before it is computed in process. Must not raise."""
        ...


@dataclass(slots=True)
class _Routing:
    """One call's routing on the host."""

    layer: int
    x_TH: torch.Tensor
    experts_Tk: Int64Array
    weights_n: Float32Array
    """Flattened (T, k)."""
    dead: set[int] = field(default_factory=set)
    """Workers that failed during this call."""


class Dispatcher:
    """Routes expert calls by the current table.

    Args:
        local: the engine's own functions: instances in process, and the cold copies that a failed call falls back to.
        table: where each function has its instances.
        config: patience.
    """

    def __init__(self, local: FeedForward, table: RoutingTable, config: DispatchConfig | None = None) -> None:
        self._local = local
        self._config = config or DispatchConfig()
        self._num_experts = local.pool.num_experts
        self._channels: dict[str, Channel] = {}
        self._retired: list[Channel] = []
        self._lock = threading.Lock()
        self._steps = [0] * len(self._num_experts)
        self._observer: LayerObserver | None = None
        self.metrics = DispatchMetrics(self._num_experts)
        if table.step_cost is not None:
            warm_up()
        self.table = table
        self._compiled = self._compile(table)

    # ---- the plan, set by control threads ---------------------------------------------------------------------

    def set_table(self, table: RoutingTable) -> None:
        """Use `table` from the next layer on. Raises ValueError if it is not newer."""
        if table.step_cost is not None:
            warm_up()  # before the lock, for which the compute thread may wait
        with self._lock:
            if table.version <= self.table.version:
                raise ValueError(f"table version must be above {self.table.version}, got {table.version}")
            self.table = table
            self._compiled = self._compile(table)

    def set_channels(self, channels: Mapping[str, Channel]) -> None:
        """Replace the channels to workers. A worker without one is not used.

        Lines left out are closed by the compute thread before its next layer: it may be waiting on one now.
        """
        with self._lock:
            self._retired += [c for name, c in self._channels.items() if channels.get(name) is not c]
            self._channels = dict(channels)
            self._compiled = self._compile(self.table)

    def set_observer(self, observer: LayerObserver | None) -> None:
        """Tell `observer` of every layer while it watches."""
        self._observer = observer

    def close(self) -> None:
        """Hang up on every worker. Only once no forward runs and none will."""
        self.set_channels({})
        self._close_retired()

    def _close_retired(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
        for channel in retired:
            channel.close()

    @property
    def channels(self) -> Mapping[str, Channel]:
        return self._channels

    @property
    def local(self) -> FeedForward:
        return self._local

    def _compile(self, table: RoutingTable) -> list[CompiledLayer]:
        known = frozenset(self._channels) | {LOCAL_WORKER}
        return [
            compile_layer(table, layer, num_experts, known=known) for layer, num_experts in enumerate(self._num_experts)
        ]

    # ---- one layer, in the compute thread ---------------------------------------------------------------------

    def forward(
        self, layer: int, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        """The layer's routed output: for each token the gate-weighted sum over its experts.

        Returns: (T, H), in hidden's dtype and on its device.
        Raises: FunctionUnavailableError naming the function, if nobody can compute it.
        """
        started_s = time.perf_counter()
        self._steps[layer] += 1
        if self._retired:
            self._close_retired()
        compiled = self._compiled[layer]
        if compiled.workers == (LOCAL_WORKER,):
            out_TH = self._forward_local(layer, hidden_TH, top_k_index_Tk, top_k_weights_Tk)
        else:
            routing = _Routing(
                layer=layer,
                x_TH=hidden_TH,
                experts_Tk=top_k_index_Tk.cpu().numpy(),
                weights_n=top_k_weights_Tk.reshape(-1).float().cpu().numpy(),
            )
            groups = group_by_worker(compiled, routing.experts_Tk, step=self._steps[layer])
            out_TH = self._exchange(compiled, routing, groups).to(hidden_TH.dtype)
        self.metrics.observe_layer(time.perf_counter() - started_s)
        return out_TH

    def _forward_local(
        self, layer: int, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        is_watched = self._observer is not None and self._observer.is_watching
        is_resident = hidden_TH.is_cuda and self._local.pool.is_full(layer)
        if is_watched or not is_resident:
            experts_Tk = top_k_index_Tk.cpu().numpy()
        if self._observer is not None and is_watched:
            self._observer.observe_layer(layer, hidden_TH, experts_Tk, _float_array(top_k_weights_Tk))
        if is_resident:
            self.metrics.count_local(LOCAL_WORKER, top_k_index_Tk.numel())
            return self._local.forward_resident(layer, hidden_TH, top_k_index_Tk, top_k_weights_Tk)
        num_tokens, top_k = top_k_index_Tk.shape
        experts_n = experts_Tk.reshape(-1)
        weights_n = top_k_weights_Tk.reshape(-1)
        if num_tokens == 1:  # pairs of one row need no order: each gets its own product
            rows_n = np.zeros(top_k, dtype=np.int64)
        else:
            order_n = np.argsort(experts_n, kind="stable")
            rows_n, experts_n = order_n // top_k, experts_n[order_n]
            weights_n = weights_n.index_select(0, torch.from_numpy(order_n).to(weights_n.device))
        out_TH = self._local.partial_sums(layer, hidden_TH, rows_n, experts_n, weights_n)
        self.metrics.count_local(LOCAL_WORKER, num_tokens * top_k)
        return out_TH

    def _exchange(self, compiled: CompiledLayer, routing: _Routing, groups: list[WorkerGroup]) -> torch.Tensor:
        """Send to all, compute the local part meanwhile, collect and add in worker order."""
        out_TH = torch.zeros(routing.x_TH.shape, dtype=torch.float32, device=routing.x_TH.device)
        local: WorkerGroup | None = None
        pending: list[tuple[WorkerGroup, Channel]] = []
        failed: list[WorkerGroup] = []
        for group in groups:
            name = compiled.workers[group.worker]
            if name == LOCAL_WORKER:
                local = group
                continue
            for part in _split_rows(group, self._channels.get(name)):
                if pending and pending[-1][0].worker == part.worker:
                    self._collect_into(out_TH, compiled, routing, *pending.pop(), failed)
                channel = self._submit(name, routing, part)
                if channel is None:
                    routing.dead.add(part.worker)
                    failed.append(part)
                else:
                    pending.append((part, channel))
        local_RH: torch.Tensor | None = None
        try:
            if self._observer is not None and self._observer.is_watching:
                weights_Tk = routing.weights_n.reshape(routing.experts_Tk.shape)
                self._observer.observe_layer(routing.layer, routing.x_TH, routing.experts_Tk, weights_Tk)
            if local is not None:
                local_RH = self._compute_here(routing, local)
        finally:  # an answer left in its channel would be taken for the next call's
            for group, channel in pending:
                self._collect_into(out_TH, compiled, routing, group, channel, failed)
        if local is not None and local_RH is not None:
            _add(out_TH, local, local_RH)
        for group in failed:
            self._retry(out_TH, compiled, routing, group)
        return out_TH

    def _submit(self, worker: str, routing: _Routing, group: WorkerGroup) -> Channel | None:
        channel = self._channels.get(worker)
        if channel is None:
            return None
        try:
            channel.submit(
                LayerCall(
                    layer=routing.layer,
                    x_TH=routing.x_TH,
                    tokens_R=group.tokens_R,
                    rows_n=group.rows_n,
                    experts_n=group.experts_n,
                    weights_n=routing.weights_n[group.pairs_n],
                )
            )
        except TransportError as error:
            _log_failure(error, worker, routing.layer)
            return None
        return channel

    def _collect_into(
        self,
        out_TH: torch.Tensor,
        compiled: CompiledLayer,
        routing: _Routing,
        group: WorkerGroup,
        channel: Channel,
        failed: list[WorkerGroup],
    ) -> None:
        worker = compiled.workers[group.worker]
        try:
            partial_RH = channel.collect(self._config.timeout_s(len(group.tokens_R)))
        except TransportError as error:
            _log_failure(error, worker, routing.layer)
            routing.dead.add(group.worker)
            failed.append(group)
            return
        _add(out_TH, group, partial_RH)
        self.metrics.count_remote(worker, routing.layer, group.experts_n)

    def _retry(self, out_TH: torch.Tensor, compiled: CompiledLayer, routing: _Routing, group: WorkerGroup) -> None:
        """Once on other instances of the functions, then on the engine's own copies."""
        others, left = regroup_elsewhere(compiled, group, routing.experts_Tk, dead=routing.dead)
        failed: list[WorkerGroup] = [] if left is None else [left]
        for other in others:
            name = compiled.workers[other.worker]
            if name == LOCAL_WORKER:
                failed.append(other)
                continue
            self.metrics.retries += 1
            for part in _split_rows(other, self._channels.get(name)):
                channel = self._submit(name, routing, part)
                if channel is None:
                    failed.append(part)
                else:
                    self._collect_into(out_TH, compiled, routing, part, channel, failed)
        for remaining in failed:
            self.metrics.fallbacks += 1
            _add(out_TH, remaining, self._compute_here(routing, remaining))

    def _compute_here(self, routing: _Routing, group: WorkerGroup) -> torch.Tensor:
        names = ", ".join(str(FunctionId(routing.layer, e)) for e in np.unique(group.experts_n).tolist())
        try:
            device = self._local.pool.device
            x_RH = routing.x_TH.index_select(0, torch.from_numpy(group.tokens_R).to(routing.x_TH.device))
            weights_n = torch.from_numpy(routing.weights_n[group.pairs_n]).to(device)
            partial_RH = self._local.partial_sums(
                routing.layer, x_RH.to(device), group.rows_n, group.experts_n, weights_n
            )
        except Exception as error:  # out of memory, a damaged package: whatever it is, this was the last resort
            raise FunctionUnavailableError(f"no instance could compute {names}: {error}") from error
        self.metrics.count_local(LOCAL_WORKER, len(group.experts_n))
        return partial_RH


def _log_failure(error: TransportError, worker: str, layer: int) -> None:
    """A worker that starts fails every call until it has: that is no news."""
    level = logging.DEBUG if isinstance(error, WorkerStartingError) else logging.WARNING
    logger.log(level, "call failed worker=%s layer=%d reason=%s", worker, layer, error)


def _float_array(tensor: torch.Tensor) -> Float32Array:
    """In float32, on the host; a view where it is both already."""
    if tensor.dtype is torch.float32 and not tensor.is_cuda:
        return tensor.numpy()
    return tensor.float().cpu().numpy()


def _add(out_TH: torch.Tensor, group: WorkerGroup, partial_RH: torch.Tensor) -> None:
    partial_RH = partial_RH.to(device=out_TH.device, dtype=out_TH.dtype)
    if len(group.tokens_R) == len(out_TH):
        out_TH.add_(partial_RH)
    else:
        out_TH.index_add_(0, torch.from_numpy(group.tokens_R).to(out_TH.device), partial_RH)


def _split_rows(group: WorkerGroup, channel: Channel | None) -> Iterator[WorkerGroup]:
    """The group in parts of at most as many rows as one call may have."""
    if channel is None or len(group.tokens_R) <= channel.max_rows:
        yield group
        return
    for start in range(0, len(group.tokens_R), channel.max_rows):
        stop = start + channel.max_rows
        inside = (group.rows_n >= start) & (group.rows_n < stop)
        yield WorkerGroup(
            worker=group.worker,
            tokens_R=group.tokens_R[start:stop],
            rows_n=group.rows_n[inside] - start,
            experts_n=group.experts_n[inside],
            pairs_n=group.pairs_n[inside],
        )
