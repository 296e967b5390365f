"""The features of `features.py`, kept up step by step while a server decodes.

The past of each sequence is a ring of its last W tokens: their experts, and the same as bit sets, so that what two
tokens share is a popcount. A step's own choices join the past at its end.

Shapes: n rows of a step (padding left out), q rows among them with a past, L layers, E experts, k experts per token,
W window, w words of 64 experts, Z slots for sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_predictors.base import FloatArray, IntArray
from moeless_predictors.features import (
    LEAST_SHARE,
    MEAN_SCALE,
    NUM_BEFORE,
    FeatureConfig,
    choice_values,
    experts_as_bits,
    ranked_values,
)

_LEAST_MEAN = 1e-12
"""Below it, that of an expert long unused is zero: else it ends as a subnormal number after some 1,700 tokens, and such
made the network seven times as slow."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of a step that are consecutive tokens of one sequence."""

    sequence_id: str
    num_rows: int
    first_position: int
    is_prefill: bool = False


class LiveFeatures:
    """Features of the tokens of the step that is under way.

    Call `begin_step`, then for each layer in order `observe` and any number of `features`, then `end_step`. A step
    that is broken off leaves the past as it was.

    Args:
        num_slots: sequences whose past is kept at first; more are made room for as they come.
    """

    def __init__(
        self, config: FeatureConfig, *, num_layers: int, num_experts: int, top_k: int, num_slots: int = 16
    ) -> None:
        self._config = config
        self._num_layers, self._num_experts, self._top_k = num_layers, num_experts, top_k
        self._slot_of: dict[str, int] = {}
        self._free = list(range(num_slots))[::-1]
        window, words = config.window, -(-num_experts // 64)
        expert_type = np.uint8 if num_experts <= 256 else np.uint16
        self._experts_LZWk = np.zeros((num_layers, num_slots, window, top_k), dtype=expert_type)
        self._bits_LZWw = np.zeros((num_layers, num_slots, window, words), dtype=np.uint64)
        self._shared_ZW = np.zeros((num_slots, window), dtype=np.float32)
        """What the newest token shares, over all layers, with each token that it could look back on."""
        self._last_values_ZLE = np.zeros((num_slots, num_layers, num_experts), dtype=np.float32)
        self._means_ZLE = np.zeros((num_slots, num_layers, num_experts), dtype=np.float32)
        self._num_seen_Z = np.zeros(num_slots, dtype=np.int64)
        self._next_position_Z = np.zeros(num_slots, dtype=np.int64)
        self._rows: list[StepRows] = []
        self._slots: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the sequences' past."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def begin_step(self, rows: Sequence[StepRows]) -> None:
        """The rows of the step in order. A sequence that does not go on where it stopped starts without a past."""
        self._rows = list(rows)
        self._slots = [self._slot(item) for item in rows]
        self._num_rows = sum(item.num_rows for item in rows)
        firsts = np.cumsum([0, *(item.num_rows for item in rows)])[:-1].tolist()
        self._firsts: list[int] = firsts
        has_past = [
            not item.is_prefill and item.num_rows == 1 and self._num_seen_Z[slot] > 0
            for item, slot in zip(rows, self._slots, strict=True)
        ]
        self._past_rows_q = np.array([first for first, has in zip(firsts, has_past, strict=True) if has], dtype=np.intp)
        slots_q = np.array([slot for slot, has in zip(self._slots, has_past, strict=True) if has], dtype=np.intp)
        self._past_slots_q = slots_q
        self._has_past_everywhere = len(slots_q) == self._num_rows
        num_layers, num_rows, window = self._num_layers, self._num_rows, self._config.window
        words = self._bits_LZWw.shape[3]
        self._num_observed = 0
        self._row_n1 = np.arange(num_rows)[:, np.newaxis]
        self._experts_Lnk = np.empty((num_layers, num_rows, self._top_k), dtype=self._experts_LZWk.dtype)
        self._bits_Lnw = np.empty((num_layers, num_rows, words), dtype=np.uint64)
        self._values_nLE = np.zeros((num_rows, num_layers, self._num_experts), dtype=np.float32)
        self._past_bits_qWw = np.empty((len(slots_q), window, words), dtype=np.uint64)
        self._overlaps_qW = np.zeros((len(slots_q), window), dtype=np.float32)
        self._shared_qW = np.zeros((len(slots_q), window), dtype=np.float32)
        scale = self._config.sharpness * self._config.context_weight / (num_layers * self._top_k)
        # A token's predecessor stands one place before it in the ring. Places not yet taken must not be found.
        self._context_qW = np.roll(self._shared_ZW[slots_q], 1, axis=1) * np.float32(scale)
        self._context_qW[np.arange(window) >= self._num_seen_Z[slots_q][:, np.newaxis]] = -np.inf

    def observe(self, layer: int, experts_nk: IntArray, weights_nk: FloatArray) -> None:
        """What the gate of `layer` chose for the step's rows."""
        assert layer == self._num_observed, "layers come in order"
        self._num_observed += 1
        self._experts_Lnk[layer] = experts_nk
        self._values_nLE[self._row_n1, layer, experts_nk] = choice_values(weights_nk)
        bits_nw = self._bits_Lnw[layer] = experts_as_bits(experts_nk, self._num_experts)
        if self._config.sees_ranks(layer):
            self._ranked_nF = ranked_values(experts_nk, weights_nk, self._num_experts)
        if len(self._past_slots_q):
            past_qWw = self._past_bits_qWw
            np.take(self._bits_LZWw[layer], self._past_slots_q, axis=0, out=past_qWw, mode="clip")
            past_qWw &= self._with_past(bits_nw)[:, np.newaxis]
            counts_qWw = np.bitwise_count(past_qWw)
            counts_qW = counts_qWw[:, :, 0] if counts_qWw.shape[2] == 1 else counts_qWw.sum(axis=2)
            shared_qW = counts_qW.astype(np.float32)
            self._overlaps_qW *= np.float32(self._config.layer_decay)
            self._overlaps_qW += shared_qW
            self._shared_qW += shared_qW

    def features(self, layer: int, target: int) -> FloatArray:
        """Of every row, shape (n, F), float32, after `layer` was observed and before the next one is."""
        num_experts, num_rows, config = self._num_experts, self._num_rows, self._config
        num_features = config.num_features(layer, num_experts=num_experts, top_k=self._top_k)
        num_above = config.num_above(layer, num_experts=num_experts, top_k=self._top_k)
        features_nF = np.zeros((num_rows, num_features), dtype=np.float32)
        above = config.above(layer)
        num_first = len(above) - min(config.layers_above, layer + 1)
        nearest = self._values_nLE[:, above[num_first] : layer + 1].reshape(num_rows, -1)
        features_nF[:, : num_first * num_experts] = self._values_nLE[:, :num_first].reshape(num_rows, -1)
        features_nF[:, num_first * num_experts : len(above) * num_experts] = nearest
        if config.sees_ranks(layer):
            features_nF[:, len(above) * num_experts : num_above] = self._ranked_nF
        slots_q = self._past_slots_q
        if len(slots_q):
            before = (
                self._last_values_ZLE[slots_q, target],
                self._means_ZLE[slots_q, target],
                self._retrieved(layer, target),
            )
            assert len(before) == NUM_BEFORE
            rows_q = slice(None) if self._has_past_everywhere else self._past_rows_q
            for block, values_qE in enumerate(before):
                start = num_above + block * num_experts
                features_nF[rows_q, start : start + num_experts] = values_qE
        return features_nF

    def _retrieved(self, layer: int, target: int) -> FloatArray:
        # As in features.retrieval_shares, over the few places that count.
        scale = self._config.sharpness * self._config.overlap_scale(layer, self._top_k)
        powers_qW = self._overlaps_qW * np.float32(scale)
        powers_qW += self._context_qW
        np.exp(powers_qW, out=powers_qW)  # scores are from 0 to some tens: nothing overflows
        sums_q1 = powers_qW.sum(axis=1, keepdims=True)
        place_m = np.flatnonzero(powers_qW >= sums_q1 * np.float32(LEAST_SHARE))
        row_m, column_m = np.divmod(place_m, powers_qW.shape[1])
        shares_m = powers_qW.ravel()[place_m] / sums_q1[row_m, 0]
        experts_mk = self._experts_LZWk[target, self._past_slots_q[row_m], column_m]
        flat_mk = experts_mk + (row_m * self._num_experts)[:, np.newaxis]
        size = len(powers_qW) * self._num_experts
        retrieved: NDArray[Any] = np.bincount(flat_mk.ravel(), weights=np.repeat(shares_m, self._top_k), minlength=size)
        retrieved_qE: FloatArray = retrieved.reshape(len(powers_qW), self._num_experts)
        return retrieved_qE

    def _with_past(self, values_n: NDArray[Any]) -> NDArray[Any]:
        """Of the rows that have a past."""
        return values_n if self._has_past_everywhere else values_n[self._past_rows_q]

    def end_step(self) -> None:
        """Every layer was observed: the step's tokens join their sequences' past."""
        assert self._num_observed == self._num_layers, "every layer must have been observed"
        rows_q, slots_q = self._past_rows_q, self._past_slots_q
        if len(slots_q):
            self._append(slots_q, rows_q, self._with_past(self._values_nLE))
        followed = set(rows_q.tolist())
        for item, slot, first in zip(self._rows, self._slots, self._firsts, strict=True):
            rows = slice(first, first + item.num_rows)
            if first not in followed:
                self._append_span(slot, self._experts_Lnk[:, rows], self._bits_Lnw[:, rows], self._values_nLE[rows])
            self._next_position_Z[slot] = item.first_position + item.num_rows
        self._rows, self._slots = [], []

    def forget(self, sequence_id: str) -> None:
        """The sequence ended; its place is another's. Unknown ones are ignored."""
        slot = self._slot_of.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def _append(self, slots_q: IntArray, rows_q: IntArray, values_qLE: FloatArray) -> None:
        """One token for each of these sequences, whose shared experts were followed through the layers."""
        places_q = self._num_seen_Z[slots_q] % self._config.window
        self._experts_LZWk[:, slots_q, places_q] = self._experts_Lnk[:, rows_q]
        self._bits_LZWw[:, slots_q, places_q] = self._bits_Lnw[:, rows_q]
        self._shared_ZW[slots_q] = self._shared_qW
        self._last_values_ZLE[slots_q] = values_qLE
        rate = np.float32(self._config.mean_rate)
        means_qLE = self._means_ZLE[slots_q]
        means_qLE *= 1 - rate
        means_qLE += (values_qLE > 0) * np.float32(rate * MEAN_SCALE)
        means_qLE[means_qLE < _LEAST_MEAN] = 0
        self._means_ZLE[slots_q] = means_qLE
        self._num_seen_Z[slots_q] += 1

    def _append_span(self, slot: int, experts_Lnk: IntArray, bits_Lnw: IntArray, values_nLE: FloatArray) -> None:
        """Any number of tokens for one sequence."""
        window, num_rows = self._config.window, experts_Lnk.shape[1]
        kept = np.arange(max(0, num_rows - 1 - window), num_rows - 1)
        places = (self._num_seen_Z[slot] + kept) % window
        self._experts_LZWk[:, slot, places] = experts_Lnk[:, kept]
        self._bits_LZWw[:, slot, places] = bits_Lnw[:, kept]
        # What the last token shares is counted before it takes the place of the oldest one.
        shared_LWw = np.bitwise_count(self._bits_LZWw[:, slot] & bits_Lnw[:, -1, np.newaxis])
        self._shared_ZW[slot] = shared_LWw.sum(axis=(0, 2), dtype=np.int64)
        place = (self._num_seen_Z[slot] + num_rows - 1) % window
        self._experts_LZWk[:, slot, place] = experts_Lnk[:, -1]
        self._bits_LZWw[:, slot, place] = bits_Lnw[:, -1]
        self._last_values_ZLE[slot] = values_nLE[-1]
        rate = self._config.mean_rate
        weights_n = MEAN_SCALE * rate * (1 - rate) ** np.arange(num_rows - 1, -1, -1)
        self._means_ZLE[slot] *= (1 - rate) ** num_rows
        self._means_ZLE[slot] += np.einsum("n,nle->le", weights_n, values_nLE > 0)
        self._num_seen_Z[slot] += num_rows

    def _slot(self, item: StepRows) -> int:
        slot = self._slot_of.get(item.sequence_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slot_of[item.sequence_id] = self._free.pop()
            self._clear(slot)
        elif self._next_position_Z[slot] != item.first_position:
            self._clear(slot)  # computed again, or its prompt was found in shared pages: not what was seen last
        return slot

    def _clear(self, slot: int) -> None:
        self._bits_LZWw[:, slot] = 0
        self._shared_ZW[slot] = 0
        self._last_values_ZLE[slot] = 0
        self._means_ZLE[slot] = 0
        self._num_seen_Z[slot] = 0

    def _grow(self) -> None:
        """Twice the slots."""
        num_slots = len(self._num_seen_Z)
        for name in ("_experts_LZWk", "_bits_LZWw"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)], axis=1))
        for name in ("_shared_ZW", "_last_values_ZLE", "_means_ZLE", "_num_seen_Z", "_next_position_Z"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self._free += range(2 * num_slots - 1, num_slots - 1, -1)
