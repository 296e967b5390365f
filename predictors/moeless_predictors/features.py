"""Features of a token, once its layer l has been routed, that predict its routing at layer l+d.

Two sorts. **Above**: the token's own choices at layer l and the layers before it. **Before**: its sequence's past: the
choices of the token before it at the target layer, a running mean of such choices, and what followed at the target
layer when the sequence's past was most similar to now. The last is retrieval: each of the last W tokens is
compared with this one (how many experts they share at the layers so far, recent layers weighted higher, and how many
their predecessors shared at all layers), and the routing of those that resemble it is averaged with softmax weights. A
token that occurs again in a text is routed much as the first time, and this finds it without knowing what token it was.

In a prefill a whole prompt passes a layer at once, so nothing is known of what its tokens' predecessors chose further
up: such rows have the features above only, the others are zero.

`live_features.py` computes the same features step by step; a test holds the two together.

Shapes: T tokens, L layers, E experts, k experts per token, n rows of one block, m rows that they look back on,
W window, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import lfilter

from moeless_predictors.arrays import BoolArray, FloatArray, IntArray, UInt64Array
from moeless_predictors.base import one_hot
from moeless_predictors.traces import PREFILL, RoutingTrace

MEAN_SCALE = 3.0
"""Brings the running mean, some k/E, nearer to the size of the other features."""
_MAX_SCORE = 80.0
"""Score whose exponential still fits float32."""
MIN_SHARE = 0.005
"""Smallest share of retrieval's softmax that counts. Most of a window is below it and is not looked up."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Choice of features. Part of a saved predictor, which works only with the features that it was fitted on."""

    layers_above: int = 6
    """Layers whose choices for the token itself are seen: l and those right before it."""
    first_layers: int = 2
    """Number of the model's first layers seen as well: their routing depends strongly on the token itself."""
    ranked_layers: int = 2
    """Source layers below this one, which have few layers above them, see their own choices by rank, too."""
    window: int = 128
    """W: tokens of the same sequence that retrieval looks back on."""
    layer_decay: float = 0.8
    """Factor on a layer's shared experts for each layer further up."""
    context_weight: float = 0.5
    """Weight of the experts that the predecessors of two tokens share."""
    sharpness: float = 20.0
    """Sharpness of retrieval's softmax."""
    mean_rate: float = 0.05
    """Rate of the running mean, which looks back on about 1 / mean_rate tokens."""

    def __post_init__(self) -> None:
        for name, minimum in (("layers_above", 1), ("first_layers", 0), ("ranked_layers", 0), ("window", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"features.{name} must be at least {minimum}, got {getattr(self, name)}")
        for name in ("layer_decay", "mean_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"features.{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("context_weight", "sharpness"):
            if getattr(self, name) < 0:
                raise ValueError(f"features.{name} must be at least 0, got {getattr(self, name)}")
        if self.sharpness * (1 + self.context_weight) > _MAX_SCORE:
            raise ValueError(
                f"features.sharpness must be at most {_MAX_SCORE} / (1 + context_weight), got {self.sharpness}"
            )

    def above(self, layer: int) -> list[int]:
        """The layers whose choices for the token itself are features of source layer `layer`."""
        nearest = range(max(0, layer - self.layers_above + 1), layer + 1)
        return [*range(min(self.first_layers, nearest.start)), *nearest]

    def sees_ranks(self, layer: int) -> bool:
        """Return whether the choices of source layer `layer` are features by rank, too."""
        return layer < self.ranked_layers

    def num_above(self, layer: int, *, num_experts: int, top_k: int) -> int:
        """Features of source layer `layer` that a token has of itself; they come first."""
        return (len(self.above(layer)) + (top_k if self.sees_ranks(layer) else 0)) * num_experts

    def num_features(self, layer: int, *, num_experts: int, top_k: int) -> int:
        """F for source layer `layer`."""
        return self.num_above(layer, num_experts=num_experts, top_k=top_k) + NUM_BEFORE * num_experts

    def overlap_scale(self, layer: int, top_k: int) -> float:
        """1 / what the decayed overlaps of two tokens alike at every layer up to `layer` add up to."""
        return 1.0 / (top_k * sum(self.layer_decay**i for i in range(layer + 1)))


NUM_BEFORE = 3
"""Blocks of E features from the past, all of the target layer: the token before, the running mean, retrieval."""


def choice_values(weights_nk: FloatArray) -> FloatArray:
    """A chosen expert's feature: half for being chosen, half by its part of the gate weights; 1 on average."""
    values_nk = _relative(weights_nk)
    values_nk *= 0.5
    values_nk += 0.5
    return values_nk


def ranked_values(experts_nk: IntArray, weights_nk: FloatArray, num_experts: int) -> FloatArray:
    """A block of E features for each rank, shape (n, k × E): the gate weight of the choice that has the rank."""
    relative_nk = _relative(weights_nk)
    order_nk = np.argsort(-relative_nk, axis=1, kind="stable")
    num_tokens, top_k = experts_nk.shape
    ranked_nkE = np.zeros((num_tokens, top_k, num_experts), dtype=np.float32)
    places_nk = np.take_along_axis(experts_nk.astype(np.intp), order_nk, axis=1)
    values_nk = np.take_along_axis(relative_nk, order_nk, axis=1)
    np.put_along_axis(ranked_nkE, places_nk[:, :, np.newaxis], values_nk[:, :, np.newaxis], axis=2)
    return ranked_nkE.reshape(num_tokens, top_k * num_experts)


def _relative(weights_nk: FloatArray) -> FloatArray:
    """Each token's gate weights in proportion, 1 on average."""
    weights_nk = np.asarray(weights_nk, dtype=np.float32)
    sums_n1 = np.add.reduce(weights_nk, axis=1, keepdims=True)
    if not np.logical_and.reduce(sums_n1, axis=None):
        sums_n1 = np.where(sums_n1 > 0, sums_n1, 1)
    relative_nk: FloatArray = weights_nk * (weights_nk.shape[1] / sums_n1)
    return relative_nk


def retrieval_shares(scores_nm: FloatArray, may_see_nm: BoolArray) -> FloatArray:
    """Softmax of each row over what it may see; zeros where it may see nothing, and for shares that hardly count."""
    scores_nm = np.where(may_see_nm, scores_nm, -np.inf)
    highest_n = scores_nm.max(axis=1, keepdims=True)
    powers_nm = np.exp(scores_nm - np.where(np.isfinite(highest_n), highest_n, 0))
    sums_n = powers_nm.sum(axis=1, keepdims=True)
    shares_nm: FloatArray = powers_nm / np.where(sums_n > 0, sums_n, 1)
    shares_nm[shares_nm < MIN_SHARE] = 0
    return shares_nm


@dataclass(slots=True)
class _Block:
    """Consecutive rows of one sequence and the rows that they may look back on."""

    rows: slice
    seen: slice
    overlaps_nm: FloatArray
    context_nm: FloatArray
    may_see_nm: BoolArray


class TraceFeatures:
    """The features of every token of a trace, one source layer after the other.

    Holds, for each token, two values for each token that it looks back on: about 1.5 kB a token with a window of 128.
    """

    def __init__(self, trace: RoutingTrace, config: FeatureConfig) -> None:
        self._trace = trace
        self._config = config
        self._num_experts = trace.num_experts
        self._runs = _runs(trace)
        self._is_blank_T = np.asarray(trace.phase_T) == PREFILL
        self._blocks = [block for run in self._runs for block in self._cut(run)]
        self._layer = -1

    def chosen(self, layer: int) -> FloatArray:
        """1 where a token went to an expert of `layer`, shape (T, E): what is to be predicted."""
        return one_hot(np.asarray(self._trace.experts_TLk[:, layer]), self._num_experts)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Source layers in order, each with a function target layer → features of shape (T, F), float32."""
        for layer in range(self._trace.num_layers):
            self._advance(layer)
            yield layer, lambda target, layer=layer: self._features(layer, target)

    def _advance(self, layer: int) -> None:
        """Add `layer`'s shared experts to what retrieval compares by."""
        chosen_TE = self.chosen(layer)
        for block in self._blocks:
            block.overlaps_nm *= self._config.layer_decay
            block.overlaps_nm += chosen_TE[block.rows] @ chosen_TE[block.seen].T
        self._layer = layer

    def _features(self, layer: int, target: int) -> FloatArray:
        assert layer == self._layer, "features of a layer must be taken while it is the current one"
        chosen_TE = self.chosen(target)
        before = [self._previous_values(target), self._running_mean(chosen_TE), self._retrieved(chosen_TE)]
        above = [self._values(seen) for seen in self._config.above(layer)]
        if self._config.sees_ranks(layer):
            experts_Tk, weights_Tk = self._trace.experts_TLk[:, layer], self._trace.weights_TLk[:, layer]
            above.append(ranked_values(np.asarray(experts_Tk), weights_Tk, self._num_experts))
        features_TF = np.concatenate([*above, *before], axis=1)
        num_above = self._config.num_above(layer, num_experts=self._num_experts, top_k=self._trace.top_k)
        features_TF[self._is_blank_T, num_above:] = 0
        return features_TF

    def _values(self, layer: int) -> FloatArray:
        experts_Tk, weights_Tk = self._trace.experts_TLk[:, layer], self._trace.weights_TLk[:, layer]
        return one_hot(np.asarray(experts_Tk), self._num_experts, values_nk=choice_values(weights_Tk))

    def _previous_values(self, layer: int) -> FloatArray:
        """The values of the token before, zero where the run has none."""
        values_TE = self._values(layer)
        previous_TE = np.zeros_like(values_TE)
        for run in self._runs:
            previous_TE[run.start + 1 : run.stop] = values_TE[run.start : run.stop - 1]
        return previous_TE

    def _running_mean(self, chosen_TE: FloatArray) -> FloatArray:
        rate = self._config.mean_rate
        means_TE = np.zeros_like(chosen_TE)
        for run in self._runs:
            means_TE[run] = lfilter([0.0, MEAN_SCALE * rate], [1.0, rate - 1.0], chosen_TE[run], axis=0)
        return means_TE

    def _retrieved(self, chosen_TE: FloatArray) -> FloatArray:
        scale = self._config.overlap_scale(self._layer, self._trace.top_k)
        retrieved_TE = np.zeros_like(chosen_TE)
        for block in self._blocks:
            scores_nm = self._config.sharpness * (block.overlaps_nm * scale + block.context_nm)
            retrieved_TE[block.rows] = retrieval_shares(scores_nm, block.may_see_nm) @ chosen_TE[block.seen]
        return retrieved_TE

    def _cut(self, run: slice) -> Iterator[_Block]:
        """Blocks of at most W rows, with what their predecessors share over all layers."""
        window = self._config.window
        per_layer = self._config.context_weight / (self._trace.num_layers * self._trace.top_k)
        for start in range(run.start, run.stop, window):
            rows = slice(start, min(start + window, run.stop))
            seen = slice(max(run.start, start - window), rows.stop)
            row_n, row_m = np.arange(rows.start, rows.stop)[:, np.newaxis], np.arange(seen.start, seen.stop)
            context_nm = np.zeros((len(row_n), len(row_m)), dtype=np.float32)
            # The predecessors of rows and of what they see; the run's first row has none.
            first_n, first_m = int(rows.start == run.start), int(seen.start == run.start)
            before_n = slice(rows.start - 1 + first_n, rows.stop - 1)
            before_m = slice(seen.start - 1 + first_m, seen.stop - 1)
            for layer in range(self._trace.num_layers):
                chosen_nE = one_hot(np.asarray(self._trace.experts_TLk[before_n, layer]), self._num_experts)
                chosen_mE = one_hot(np.asarray(self._trace.experts_TLk[before_m, layer]), self._num_experts)
                context_nm[first_n:, first_m:] += chosen_nE @ chosen_mE.T
            yield _Block(
                rows=rows,
                seen=seen,
                overlaps_nm=np.zeros_like(context_nm),
                context_nm=context_nm * per_layer,
                may_see_nm=(row_m < row_n) & (row_m >= row_n - window),
            )


def _runs(trace: RoutingTrace) -> list[slice]:
    """Rows that follow each other without a gap in their sequence."""
    starts = np.flatnonzero(trace.previous_T < 0)
    stops = np.append(starts[1:], trace.num_tokens)
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def experts_as_bits(experts_nk: IntArray, num_experts: int) -> UInt64Array:
    """Choices of shape (n, k) as bit sets of shape (n, words of 64 experts): what two tokens share is a popcount."""
    words = -(-num_experts // 64)
    experts_nk = experts_nk.astype(np.uint64)
    if words == 1:
        return np.bitwise_or.reduce(np.uint64(1) << experts_nk, axis=1, keepdims=True)
    bits_nw = np.zeros((len(experts_nk), words), dtype=np.uint64)
    for word in range(words):
        is_here_nk = experts_nk // 64 == word
        bit_nk = np.where(is_here_nk, np.uint64(1) << (experts_nk % np.uint64(64)), np.uint64(0))
        bits_nw[:, word] = np.bitwise_or.reduce(bit_nk, axis=1)
    return bits_nw
