"""An expert's feed-forward on grouped tokens: the computation that every instance does, whoever hosts it.

Shapes: T tokens, R rows of tokens that a process received, k experts per token, n (row, expert) pairs,
S arena rows, H hidden, I intermediate.

Two forms with the same result. `partial_sums` takes the pairs as host arrays, sorted by expert: on the CPU, and
wherever routing must be looked at to send tokens elsewhere. `forward_resident` takes the router's own tensors and
never waits for the device: for a layer whose instances are all on it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from moeless.core.arrays import Int32Array, Int64Array
from moeless.core.errors import FunctionUnavailableError
from moeless.functions.arena import LayerArena
from moeless.functions.gates import Gate, resolve_gate
from moeless.functions.pool import InstancePool

_GROUPED_MM_ALIGNMENT_BYTES = 16
"""torch's grouped_mm wants rows that begin at multiples of this."""
_FEW_PAIRS_SHARE = 0.25
"""Number of (row, expert) pairs per expert of the layer up to which separate matrix-vector products beat a grouped one,
whose set-up looks at every expert, ..."""
_FEW_SHARED = 1
"""... if no more pairs than this find their expert's weights already read by another pair."""
_LARGE_EXPERT = 100_000
"""Hidden times intermediate size from which an expert's product outweighs a few calls into torch."""
_MAX_PAIRS_PER_EXPERT = 64
"""Number of pairs per expert from which on reordering its weights costs little beside the product."""

_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class FeedForward:
    """Runs the functions of one pool. One thread computes; others may start and drain instances meanwhile."""

    def __init__(self, pool: InstancePool) -> None:
        self.pool = pool
        self._layouts = [pool.packed.layout(layer) for layer in range(pool.num_layers)]
        gates: dict[tuple[object, ...], Gate] = {}
        self._gates: list[Gate] = []
        for layout in self._layouts:
            key = (layout.gate, layout.gate_attributes, layout.activation, layout.has_gate)
            if key not in gates:
                gates[key] = resolve_gate(layout)
            self._gates.append(gates[key])
        self._grouped = [
            min(layout.hidden_size, layout.intermediate_size) % (_GROUPED_MM_ALIGNMENT_BYTES // pool.dtype.itemsize)
            == 0
            for layout in self._layouts
        ]
        self._by_expert_pays = [
            pool.dtype == torch.bfloat16
            and not layout.is_transposed
            and layout.hidden_size * layout.intermediate_size >= _LARGE_EXPERT
            for layout in self._layouts
        ]
        self._every_expert = [np.arange(num) for num in pool.num_experts]
        self._rows_on_device: dict[int, tuple[bytes, torch.Tensor]] = {}

    def partial_sums(
        self, layer: int, x_RH: torch.Tensor, rows_n: Int64Array, experts_n: Int64Array, weights_n: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each row's pairs of gate weight × expert(row).

        Args:
            x_RH: hidden states in the pool's dtype and on its device.
            rows_n, experts_n: the pairs' rows and experts, sorted by expert.
            weights_n: gate weights, any floating dtype, on the pool's device.
        Returns: (R, H), float32 accumulated, in x's dtype; rows without a pair are zero.
        Raises: what InstancePool.start raises, for a function that is cold.
        """
        out_RH = self._sum_pairs(layer, x_RH, rows_n, experts_n, weights_n)
        return out_RH.to(x_RH.dtype)

    def _sum_pairs(
        self, layer: int, x_RH: torch.Tensor, rows_n: Int64Array, experts_n: Int64Array, weights_n: torch.Tensor
    ) -> torch.Tensor:
        """`partial_sums` in float32."""
        counts_E = np.bincount(experts_n, minlength=self.pool.num_experts[layer])
        hit = np.flatnonzero(counts_E)
        try:
            arena = self.pool.acquire(layer, hit)
        except FunctionUnavailableError:
            if len(hit) == 1:
                raise
            # The pool has no room for all of them at once: one part after the other.
            is_first_n = experts_n < hit[len(hit) // 2]
            first_RH, second_RH = (
                self._sum_pairs(layer, x_RH, rows_n[part], experts_n[part], weights_n[torch.from_numpy(part)])
                for part in (np.flatnonzero(is_first_n), np.flatnonzero(~is_first_n))
            )
            return first_RH.add_(second_RH)
        try:
            arena_rows_n = self.pool.arena_rows_LE[layer][experts_n]
            on_cpu = self.pool.device.type == "cpu"
            few = len(rows_n) <= _FEW_PAIRS_SHARE * len(counts_E) and len(rows_n) - len(hit) <= _FEW_SHARED
            if on_cpu and (few or len(x_RH) == 1):
                out_RH = self._one_by_one(layer, arena, x_RH, rows_n, arena_rows_n, weights_n)
            elif on_cpu and self._by_expert_pays[layer] and len(rows_n) <= _MAX_PAIRS_PER_EXPERT * len(hit):
                out_RH = self._by_expert(layer, arena, x_RH, rows_n, arena_rows_n, weights_n)
            else:
                out_RH = self._by_group(layer, arena, x_RH, rows_n, arena_rows_n, weights_n)
        finally:
            self.pool.release(layer, hit)
        self.pool.tokens_LE[layer] += counts_E
        return out_RH

    def _one_by_one(
        self,
        layer: int,
        arena: LayerArena,
        x_RH: torch.Tensor,
        rows_n: Int64Array,
        arena_rows_n: Int64Array,
        weights_n: torch.Tensor,
    ) -> torch.Tensor:
        """Matrix-vector products, the fastest form for a handful of pairs: each reads its weights once."""
        gate = self._gates[layer]
        out_RH = torch.zeros(x_RH.shape, dtype=torch.float32)
        x_rows, out_rows = x_RH.unbind(0), out_RH.unbind(0)
        exact = x_RH.dtype == torch.float32
        for row, arena_row, weight in zip(rows_n.tolist(), arena_rows_n.tolist(), weights_n.tolist(), strict=True):
            up_HI, down_IH = arena.up_SHI[arena_row], arena.down_SIH[arena_row]
            up_I = torch.mv(up_HI.t(), x_rows[row])
            if arena.up_bias_SI is not None:
                up_I += arena.up_bias_SI[arena_row]
            inner_I = gate(up_I)
            if exact and arena.down_bias_SH is None:
                out_rows[row].addmv_(down_IH.t(), inner_I, alpha=weight)
                continue
            down_H = torch.mv(down_IH.t(), inner_I)
            if arena.down_bias_SH is not None:
                down_H += arena.down_bias_SH[arena_row]
            out_rows[row].add_(down_H, alpha=weight)
        return out_RH

    def _by_expert(
        self,
        layer: int,
        arena: LayerArena,
        x_RH: torch.Tensor,
        rows_n: Int64Array,
        arena_rows_n: Int64Array,
        weights_n: torch.Tensor,
    ) -> torch.Tensor:
        """Each expert's weights times its rows as columns.

        A matrix product in bfloat16 first brings its right-hand side into the order that the processor multiplies in.
        With the weights on the left that is the few rows, not the whole expert at every call.
        """
        gate = self._gates[layer]
        x_nH = x_RH.index_select(0, torch.from_numpy(rows_n))
        y_nH = torch.empty(len(rows_n), x_RH.shape[1], dtype=torch.float32)
        bounds = [0, *(np.flatnonzero(np.diff(arena_rows_n)) + 1).tolist(), len(rows_n)]
        for start, end in pairwise(bounds):
            arena_row = int(arena_rows_n[start])
            x_mH = x_nH[start:end]
            multiply = _times_vector if end - start == 1 else _times_columns
            up_mI = multiply(arena.up_SHI[arena_row].t(), x_mH)
            if arena.up_bias_SI is not None:
                up_mI += arena.up_bias_SI[arena_row]
            y_mH = multiply(arena.down_SIH[arena_row].t(), gate(up_mI))
            if arena.down_bias_SH is not None:
                y_mH += arena.down_bias_SH[arena_row]
            y_nH[start:end] = y_mH
        return _sum_by_row(y_nH, rows_n, weights_n, num_rows=len(x_RH))

    def _by_group(
        self,
        layer: int,
        arena: LayerArena,
        x_RH: torch.Tensor,
        rows_n: Int64Array,
        arena_rows_n: Int64Array,
        weights_n: torch.Tensor,
    ) -> torch.Tensor:
        """One grouped product for each projection over all pairs."""
        if self.pool.device.type != "cpu":  # there arena rows differ from expert numbers
            order = np.argsort(arena_rows_n, kind="stable")
            rows_n, arena_rows_n, weights_n = rows_n[order], arena_rows_n[order], weights_n[torch.from_numpy(order)]
        ends_S = np.cumsum(np.bincount(arena_rows_n, minlength=arena.num_rows), dtype=np.int32)
        offsets_S = torch.from_numpy(ends_S).to(x_RH.device, non_blocking=True)
        rows = torch.from_numpy(rows_n).to(x_RH.device, non_blocking=True)
        arena_rows = None
        if arena.up_bias_SI is not None:
            arena_rows = torch.from_numpy(arena_rows_n).to(x_RH.device, non_blocking=True)
        y_nH = self._project(layer, arena, x_RH.index_select(0, rows), offsets_S, arena_rows, ends_S)
        return _sum_by_row(y_nH, rows_n, weights_n, num_rows=len(x_RH))

    def _project(
        self,
        layer: int,
        arena: LayerArena,
        x_nH: torch.Tensor,
        offsets_S: torch.Tensor,
        arena_rows_n: torch.Tensor | None,
        ends_S: Int32Array | None,
    ) -> torch.Tensor:
        """Both projections and the gate of rows sorted by arena row. `arena_rows_n` is needed for biases only."""
        product = self._grouped_product(layer, offsets_S, ends_S)
        up_nI = product(x_nH, arena.up_SHI)
        if arena.up_bias_SI is not None and arena_rows_n is not None:
            up_nI += arena.up_bias_SI.index_select(0, arena_rows_n)
        y_nH = product(self._gates[layer](up_nI), arena.down_SIH)
        if arena.down_bias_SH is not None and arena_rows_n is not None:
            y_nH += arena.down_bias_SH.index_select(0, arena_rows_n)
        return y_nH

    def _grouped_product(self, layer: int, offsets_S: torch.Tensor, ends_S: Int32Array | None) -> _Product:
        if self._grouped[layer] and self.pool.dtype in (torch.float32, torch.bfloat16):
            return lambda x, w: F.grouped_mm(x, w, offs=offsets_S)
        ends = (offsets_S.cpu().numpy() if ends_S is None else ends_S).tolist()
        starts = [0, *ends[:-1]]

        def one_after_another(x_nA: torch.Tensor, w_SAB: torch.Tensor) -> torch.Tensor:
            y_nB = x_nA.new_zeros(x_nA.shape[0], w_SAB.shape[2])
            for arena_row, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if end > start:
                    torch.mm(x_nA[start:end], w_SAB[arena_row], out=y_nB[start:end])
            return y_nB

        return one_after_another

    def forward_resident(
        self, layer: int, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        """The whole layer on the pool's device, without waiting for the device; for a layer that is warm as a whole.

        Tokens served are counted on the device and fetched by `InstancePool.tokens_served`.
        """
        # Held until the work is queued: an arena row that is written anew is written behind it, on the same stream.
        arena = self.pool.acquire(layer, self._every_expert[layer], is_call=False)
        try:
            self.pool.count_on_device(layer, top_k_index_Tk)
            return self._queue_resident(layer, arena, hidden_TH, top_k_index_Tk, top_k_weights_Tk)
        finally:
            self.pool.release(layer, self._every_expert[layer])

    def _queue_resident(
        self,
        layer: int,
        arena: LayerArena,
        hidden_TH: torch.Tensor,
        top_k_index_Tk: torch.Tensor,
        top_k_weights_Tk: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, top_k = top_k_index_Tk.shape
        arena_rows_n = self._rows_on_device_of(layer)[top_k_index_Tk.reshape(-1)]
        arena_rows_n, order_n = torch.sort(arena_rows_n, stable=True)
        every_row_S = torch.arange(arena.num_rows, device=arena_rows_n.device)
        offsets_S = torch.searchsorted(arena_rows_n, every_row_S, right=True, out_int32=True)
        x_nH = hidden_TH.index_select(0, order_n // top_k)
        y_nH = self._project(layer, arena, x_nH, offsets_S, arena_rows_n, None)
        weights_n = top_k_weights_Tk.reshape(-1).index_select(0, order_n)
        weighted_nH = y_nH.float().mul_(weights_n.unsqueeze(-1))
        restored_nH = torch.empty_like(weighted_nH).index_copy_(0, order_n, weighted_nH)
        return restored_nH.view(num_tokens, top_k, -1).sum(1).to(hidden_TH.dtype)

    def _rows_on_device_of(self, layer: int) -> torch.Tensor:
        arena_rows_E = self.pool.arena_rows_LE[layer]
        key = arena_rows_E.tobytes()
        cached = self._rows_on_device.get(layer)
        if cached is None or cached[0] != key:
            cached = (key, torch.from_numpy(arena_rows_E.copy()).to(self.pool.device))
            self._rows_on_device[layer] = cached
        return cached[1]


def _times_vector(weight_AB: torch.Tensor, x_1B: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight_AB, x_1B[0]).unsqueeze(0)


def _times_columns(weight_AB: torch.Tensor, x_mB: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight_AB, x_mB.t()).t()


def _sum_by_row(y_nH: torch.Tensor, rows_n: Int64Array, weights_n: torch.Tensor, *, num_rows: int) -> torch.Tensor:
    """Each row's weighted sum in float32, in the pairs' order: unlike index_add_, the same on a GPU every time."""
    order_n = np.argsort(rows_n, kind="stable")
    starts_R = np.searchsorted(rows_n[order_n], np.arange(num_rows))
    order, starts = (torch.from_numpy(a).to(y_nH.device, non_blocking=True) for a in (order_n, starts_R))
    weights = weights_n.float().index_select(0, order)
    return F.embedding_bag(order, y_nH.float(), starts, mode="sum", per_sample_weights=weights)
