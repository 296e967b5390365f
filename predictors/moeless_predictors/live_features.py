"""The features of `features.py`, updated step by step while a server decodes.

The past of each sequence is a ring of its last W tokens: their experts, and the same as bit sets, so that the experts
that two tokens share are a popcount. `live_loops.py` has the loops that run between two layers. A step's own choices
join the past at its end. Of a step that is not followed only the routing is kept; before the next followed step these
join the past together, at a fraction of the cost.

Shapes: n rows of a step (padding left out), q rows among them with a past, m tokens of a sequence, L layers, E experts,
k experts per token, W window, w words of 64 experts, Z slots for sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_predictors import live_loops as loops
from moeless_predictors.arrays import FloatArray, IntArray, UInt64Array
from moeless_predictors.features import MEAN_SCALE, FeatureConfig, choice_values, experts_as_bits, ranked_values

_MAX_SKIPPED_STEPS = 64
"""Steps of which the routing is kept before it joins the past."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of a step that are consecutive tokens of one sequence."""

    sequence_id: str
    num_rows: int
    first_position: int
    is_prefill: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _SkippedStep:
    """Data kept of a step that was not followed."""

    rows: list[StepRows]
    experts_Lnk: IntArray
    weights_Lnk: FloatArray

    def is_continued_by(self, other: _SkippedStep) -> bool:
        """Return whether `other` has the next token of the same sequences, with one token each."""
        return len(self.rows) == len(other.rows) and all(
            one.num_rows == two.num_rows == 1
            and one.sequence_id == two.sequence_id
            and one.first_position + 1 == two.first_position
            for one, two in zip(self.rows, other.rows, strict=True)
        )


class LiveFeatures:
    """Features of the tokens of the step that is under way.

    Call `begin_step`, then for each layer in order `observe` and (in a step that is followed) any number of `features`,
    then `end_step`. A step that is broken off leaves the past as it was.

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
        """Experts that the newest token shares, over all layers, with each token that it could look back on."""
        self._last_values_ZLE = np.zeros((num_slots, num_layers, num_experts), dtype=np.float32)
        self._means_ZLE = np.zeros((num_slots, num_layers, num_experts), dtype=np.float32)
        self._num_seen_Z = np.zeros(num_slots, dtype=np.int64)
        self._next_position_Z = np.zeros(num_slots, dtype=np.int64)
        self._above = [np.array(config.above(layer)) for layer in range(num_layers)]
        self._rows: list[StepRows] = []
        self._slots: list[int] = []
        self._is_followed = True
        self._skipped: list[_SkippedStep | str] = []
        """In their order, and the sequences that ended between them."""

    @property
    def num_bytes(self) -> int:
        """Memory of the sequences' past."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def begin_step(self, rows: Sequence[StepRows], *, is_followed: bool = True) -> None:
        """The rows of the step in order. A sequence that does not go on where it stopped starts without a past.

        Args:
            is_followed: whether `features` will be called; else only the routing is kept.
        """
        self._rows, self._is_followed, self._num_observed = list(rows), is_followed, 0
        self._num_rows = sum(item.num_rows for item in rows)
        shape = (self._num_layers, self._num_rows, self._top_k)
        self._experts_Lnk = np.empty(shape, dtype=self._experts_LZWk.dtype)
        if not is_followed:
            self._weights_Lnk = np.empty(shape, dtype=np.float32)
            return
        self._catch_up()
        self._slots = [self._slot(item) for item in rows]
        firsts = np.cumsum([0, *(item.num_rows for item in rows)])[:-1].tolist()
        self._firsts: list[int] = firsts
        has_past = [
            not item.is_prefill and item.num_rows == 1 and self._num_seen_Z[slot] > 0
            for item, slot in zip(rows, self._slots, strict=True)
        ]
        self._past_rows_q = np.array([first for first, has in zip(firsts, has_past, strict=True) if has], dtype=np.intp)
        slots_q = np.array([slot for slot, has in zip(self._slots, has_past, strict=True) if has], dtype=np.intp)
        self._past_slots_q = slots_q
        num_layers, num_rows, window = self._num_layers, self._num_rows, self._config.window
        self._bits_Lnw = np.zeros((num_layers, num_rows, self._bits_LZWw.shape[3]), dtype=np.uint64)
        self._values_nLE = np.zeros((num_rows, num_layers, self._num_experts), dtype=np.float32)
        self._overlaps_qW = np.zeros((len(slots_q), window), dtype=np.float32)
        self._shared_qW = np.zeros((len(slots_q), window), dtype=np.float32)
        scale = self._config.sharpness * self._config.context_weight / (num_layers * self._top_k)
        # A token's predecessor stands one place before it in the ring. Places not yet taken must not be found.
        self._context_qW = np.roll(self._shared_ZW[slots_q], 1, axis=1) * np.float32(scale)
        self._context_qW[np.arange(window) >= self._num_seen_Z[slots_q][:, np.newaxis]] = -np.inf

    def observe(self, layer: int, experts_nk: IntArray, weights_nk: FloatArray) -> None:
        """Take in the choices of the gate of `layer` for the step's rows."""
        assert layer == self._num_observed, "layers come in order"
        self._num_observed += 1
        self._experts_Lnk[layer] = experts_nk
        if not self._is_followed:
            self._weights_Lnk[layer] = weights_nk
            return
        loops.note_choices(
            np.ascontiguousarray(experts_nk, dtype=np.int64),
            np.ascontiguousarray(weights_nk, dtype=np.float32),
            self._values_nLE[:, layer],
            self._bits_Lnw[layer],
        )
        if self._config.sees_ranks(layer):
            self._ranked_nF = ranked_values(experts_nk, weights_nk, self._num_experts)
        loops.compare_with_past(
            self._bits_LZWw[layer],
            self._bits_Lnw[layer],
            self._past_slots_q,
            self._past_rows_q,
            self._config.layer_decay,
            self._overlaps_qW,
            self._shared_qW,
        )

    def features(self, layer: int, target: int) -> FloatArray:
        """Features of every row, shape (n, F), float32, after `layer` was observed and before the next one is."""
        num_experts, config = self._num_experts, self._config
        num_features = config.num_features(layer, num_experts=num_experts, top_k=self._top_k)
        num_above = config.num_above(layer, num_experts=num_experts, top_k=self._top_k)
        features_nF = np.zeros((self._num_rows, num_features), dtype=np.float32)
        above = self._above[layer]
        loops.fill_above(features_nF, self._values_nLE, above)
        if config.sees_ranks(layer):
            features_nF[:, len(above) * num_experts : num_above] = self._ranked_nF
        if len(self._past_slots_q):
            powers_qW = self._overlaps_qW * np.float32(config.sharpness * config.overlap_scale(layer, self._top_k))
            powers_qW += self._context_qW
            np.exp(powers_qW, out=powers_qW)  # scores are from 0 to some tens: nothing overflows
            loops.fill_past(
                features_nF[:, num_above:],
                self._past_slots_q,
                self._past_rows_q,
                self._last_values_ZLE[:, target],
                self._means_ZLE[:, target],
                self._experts_LZWk[target],
                powers_qW,
            )
        return features_nF

    def end_step(self) -> None:
        """Every layer was observed: the step's tokens join their sequences' past."""
        assert self._num_observed == self._num_layers, "every layer must have been observed"
        if not self._is_followed:
            self._skipped.append(_SkippedStep(self._rows, self._experts_Lnk, self._weights_Lnk))
            if len(self._skipped) >= _MAX_SKIPPED_STEPS:
                self._catch_up()
            return
        rows_q, slots_q = self._past_rows_q, self._past_slots_q
        self._shared_ZW[slots_q] = self._shared_qW
        loops.append_tokens(
            slots_q,
            rows_q,
            (self._experts_Lnk, self._bits_Lnw, self._values_nLE),
            (self._experts_LZWk, self._bits_LZWw, self._last_values_ZLE, self._means_ZLE, self._num_seen_Z),
            self._config.mean_rate,
        )
        followed = set(rows_q.tolist())
        for item, slot, first in zip(self._rows, self._slots, self._firsts, strict=True):
            if first not in followed:
                rows = slice(first, first + item.num_rows)
                experts_mLqk = self._experts_Lnk[:, rows, np.newaxis].swapaxes(0, 1)
                self._append_tokens(np.array([slot]), experts_mLqk, self._values_nLE[rows.stop - 1 : rows.stop])
            self._next_position_Z[slot] = item.first_position + item.num_rows
        self._rows, self._slots = [], []

    def forget(self, sequence_id: str) -> None:
        """The sequence ended; its place is another's. Unknown ones are ignored."""
        if self._skipped:
            self._skipped.append(sequence_id)
        else:
            self._forget(sequence_id)

    def _forget(self, sequence_id: str) -> None:
        slot = self._slot_of.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def _catch_up(self) -> None:
        """Let the skipped steps join the past, those of the same sequences together."""
        skipped, self._skipped = self._skipped, []
        group: list[_SkippedStep] = []
        for event in skipped:
            if group and (isinstance(event, str) or not group[-1].is_continued_by(event)):
                self._append_skipped(group)
                group = []
            if isinstance(event, str):
                self._forget(event)
            else:
                group.append(event)
        if group:
            self._append_skipped(group)

    def _append_skipped(self, steps: list[_SkippedStep]) -> None:
        """One step; or several, of the same sequences with one token each."""
        slots = [self._slot(item) for item in steps[0].rows]
        first, single_rows, single_slots = 0, [], []
        experts_Lnk, weights_Lnk = steps[-1].experts_Lnk, steps[-1].weights_Lnk
        for item, slot in zip(steps[-1].rows, slots, strict=True):
            rows = slice(first, first + item.num_rows)
            if item.num_rows == 1:
                single_rows.append(first)
                single_slots.append(slot)
            else:
                last = slice(rows.stop - 1, rows.stop)
                values_qLE = self._dense(experts_Lnk[:, last], weights_Lnk[:, last])
                self._append_tokens(np.array([slot]), experts_Lnk[:, rows, np.newaxis].swapaxes(0, 1), values_qLE)
            self._next_position_Z[slot] = item.first_position + item.num_rows
            first = rows.stop
        if single_rows:
            experts_mLqk = np.stack([step.experts_Lnk[:, single_rows] for step in steps])
            values_qLE = self._dense(experts_Lnk[:, single_rows], weights_Lnk[:, single_rows])
            self._append_tokens(np.array(single_slots), experts_mLqk, values_qLE)

    def _dense(self, experts_Lqk: IntArray, weights_Lqk: FloatArray) -> FloatArray:
        """The choices' values, shape (q, L, E)."""
        num_layers, num_rows, top_k = experts_Lqk.shape
        values_qLE = np.zeros((num_rows, num_layers, self._num_experts), dtype=np.float32)
        values_Lqk = choice_values(weights_Lqk.reshape(-1, top_k)).reshape(experts_Lqk.shape)
        places = (np.arange(num_rows)[:, np.newaxis], np.arange(num_layers)[:, np.newaxis, np.newaxis], experts_Lqk)
        values_qLE[places] = values_Lqk
        return values_qLE

    def _append_tokens(self, slots_q: IntArray, experts_mLqk: IntArray, last_values_qLE: FloatArray) -> None:
        """Any number of tokens for each of these sequences.

        Args:
            last_values_qLE: of the last one.
        """
        window, (num_tokens, num_layers, num_slots, _) = self._config.window, experts_mLqk.shape
        bits_mLqw = experts_as_bits(experts_mLqk.reshape(-1, self._top_k), self._num_experts).reshape(
            num_tokens, num_layers, num_slots, -1
        )
        kept_m1 = np.arange(max(0, num_tokens - 1 - window), num_tokens - 1)[:, np.newaxis]
        places_mq = (self._num_seen_Z[slots_q] + kept_m1) % window
        self._put(slots_q, places_mq, experts_mLqk[kept_m1[:, 0]], bits_mLqw[kept_m1[:, 0]])
        # What the last token shares is counted before it takes the place of the oldest one.
        shared_qW = np.zeros((num_slots, window), dtype=np.float32)
        for layer in range(num_layers):
            both_qWw = self._bits_LZWw[layer, slots_q] & bits_mLqw[-1, layer, :, np.newaxis]
            shared_qW += np.bitwise_count(both_qWw).sum(axis=2)
        self._shared_ZW[slots_q] = shared_qW
        places_1q = (self._num_seen_Z[slots_q] + num_tokens - 1)[np.newaxis] % window
        self._put(slots_q, places_1q, experts_mLqk[-1:], bits_mLqw[-1:])
        self._last_values_ZLE[slots_q] = last_values_qLE
        rate = self._config.mean_rate
        added_m = MEAN_SCALE * rate * (1 - rate) ** np.arange(num_tokens - 1, -1, -1)
        row_Lq1 = (np.arange(num_slots) * num_layers + np.arange(num_layers)[:, np.newaxis])[:, :, np.newaxis]
        added = np.bincount(
            (row_Lq1 * self._num_experts + experts_mLqk).ravel(),
            weights=np.repeat(added_m, experts_mLqk[0].size),
            minlength=last_values_qLE.size,
        )
        means_qLE = self._means_ZLE[slots_q]
        means_qLE *= np.float32((1 - rate) ** num_tokens)
        means_qLE += added.reshape(means_qLE.shape)
        means_qLE[means_qLE < loops.MIN_MEAN] = 0
        self._means_ZLE[slots_q] = means_qLE
        self._num_seen_Z[slots_q] += num_tokens

    def _put(self, slots_q: IntArray, places_mq: IntArray, experts_mLqk: IntArray, bits_mLqw: UInt64Array) -> None:
        # The arrays' layers come first, where two indices stand side by side.
        self._experts_LZWk[:, slots_q, places_mq] = experts_mLqk.swapaxes(0, 1)
        self._bits_LZWw[:, slots_q, places_mq] = bits_mLqw.swapaxes(0, 1)

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
