"""The loops of `live_features.py` that run between two layers of a step, compiled.

Shapes: n rows of a step, q rows among them with a past, E experts, k experts per token, W window, w words of 64 bits,
Z slots for sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_predictors.arrays import AnyArray, FloatArray, IntArray, UInt64Array
from moeless_predictors.compiled import compiled
from moeless_predictors.features import MEAN_SCALE, MIN_SHARE

Step = tuple[AnyArray, UInt64Array, FloatArray]
"""A step's choices, shape (L, n, k), the same as bits (L, n, w), and their values (n, L, E)."""
Past = tuple[AnyArray, UInt64Array, FloatArray, FloatArray, IntArray]
"""State of the sequences: choices, shape (L, Z, W, k), the same as bits (L, Z, W, w), the last token's values and the
running means, (Z, L, E) both, and the number of tokens seen, (Z,)."""

MIN_MEAN = 1e-12
"""Below it, that of an expert long unused is zero: else it ends as a subnormal number after some 1,700 tokens, and such
made the network seven times as slow."""


@compiled
def note_choices(experts_nk: IntArray, weights_nk: FloatArray, values_nE: FloatArray, bits_nw: UInt64Array) -> None:
    """The values of a layer's choices, as `features.choice_values` has them, and the choices as bits; both begin as
    zeros.
    """
    num_rows, top_k = experts_nk.shape
    for row in range(num_rows):
        total = np.float32(0)
        for choice in range(top_k):
            total += weights_nk[row, choice]
        scale = np.float32(0.5) * np.float32(top_k) / (total if total > 0 else np.float32(1))
        for choice in range(top_k):
            expert = experts_nk[row, choice]
            values_nE[row, expert] = np.float32(0.5) + weights_nk[row, choice] * scale
            bits_nw[row, expert >> 6] |= np.uint64(1) << np.uint64(expert & 63)


@compiled
def compare_with_past(
    bits_ZWw: UInt64Array,
    bits_nw: UInt64Array,
    slots_q: IntArray,
    rows_q: IntArray,
    decay: float,
    overlaps_qW: FloatArray,
    shared_qW: FloatArray,
) -> None:
    """Add what each row shares, at one layer, with the tokens of its sequence's past; what it shared at earlier layers
    fades in `overlaps_qW`, and does not in `shared_qW`.
    """
    window, num_words = bits_ZWw.shape[1:]
    fade = np.float32(decay)
    for q in range(len(slots_q)):
        past_Ww, own_w = bits_ZWw[slots_q[q]], bits_nw[rows_q[q]]
        overlaps_W, shared_W = overlaps_qW[q], shared_qW[q]
        if num_words == 1:
            own = own_w[0]
            for place in range(window):
                shared = np.float32(_popcount(past_Ww[place, 0] & own))
                overlaps_W[place] = overlaps_W[place] * fade + shared
                shared_W[place] += shared
        else:
            for place in range(window):
                count = 0
                for word in range(num_words):
                    count += _popcount(past_Ww[place, word] & own_w[word])
                overlaps_W[place] = overlaps_W[place] * fade + np.float32(count)
                shared_W[place] += np.float32(count)


@compiled
def fill_above(features_nF: FloatArray, values_nLE: FloatArray, layers: IntArray) -> None:
    """The features of each row's own choices: a block of E for each of the layers."""
    num_experts = values_nLE.shape[2]
    for row in range(len(values_nLE)):
        for block, layer in enumerate(layers):
            start = block * num_experts
            for expert in range(num_experts):
                features_nF[row, start + expert] = values_nLE[row, layer, expert]


@compiled
def fill_past(
    features_nF: FloatArray,
    slots_q: IntArray,
    rows_q: IntArray,
    last_ZE: FloatArray,
    means_ZE: FloatArray,
    experts_ZWk: AnyArray,
    powers_qW: FloatArray,
) -> None:
    """The features of the past, all of the target layer: the token before, the running mean, what is retrieved.

    Args:
        features_nF: a block of E features for each, zeros.
        powers_qW: exponentials of the scores of the softmax that retrieval averages by, as in
            `features.retrieval_shares`.
    """
    num_experts = last_ZE.shape[1]
    window, top_k = experts_ZWk.shape[1:]
    for q in range(len(slots_q)):
        row_F, slot = features_nF[rows_q[q]], slots_q[q]
        row_F[:num_experts] = last_ZE[slot]
        row_F[num_experts : 2 * num_experts] = means_ZE[slot]
        retrieved_E = row_F[2 * num_experts :]
        total = np.float32(0)
        for place in range(window):
            total += powers_qW[q, place]
        min_power = total * np.float32(MIN_SHARE)
        for place in range(window):
            if powers_qW[q, place] >= min_power:
                share = powers_qW[q, place] / total
                for choice in range(top_k):
                    retrieved_E[experts_ZWk[slot, place, choice]] += share


@compiled
def append_tokens(slots_q: IntArray, rows_q: IntArray, step: Step, past: Past, mean_rate: float) -> None:
    """One token for each of these sequences joins its past."""
    experts_Lnk, bits_Lnw, values_nLE = step
    experts_LZWk, bits_LZWw, last_values_ZLE, means_ZLE, num_seen_Z = past
    num_layers, _, window, _ = experts_LZWk.shape
    fade, added = np.float32(1 - mean_rate), np.float32(mean_rate * MEAN_SCALE)
    for q in range(len(slots_q)):
        slot, row = slots_q[q], rows_q[q]
        place = num_seen_Z[slot] % window
        num_seen_Z[slot] += 1
        for layer in range(num_layers):
            experts_LZWk[layer, slot, place] = experts_Lnk[layer, row]
            bits_LZWw[layer, slot, place] = bits_Lnw[layer, row]
            values_E, last_E, means_E = values_nLE[row, layer], last_values_ZLE[slot, layer], means_ZLE[slot, layer]
            for expert in range(len(values_E)):
                last_E[expert] = values_E[expert]
                mean = means_E[expert] * fade + (added if values_E[expert] > 0 else np.float32(0))
                means_E[expert] = mean if mean >= MIN_MEAN else np.float32(0)


@compiled
def _popcount(word: Any) -> Any:
    """Bits set in a np.uint64; the compiler replaces this with the processor's own instruction."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
