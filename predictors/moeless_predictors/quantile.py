"""Load with its uncertainty: an upper quantile of the load of each expert that holds on data it was not fitted on.

Three things make it hold. A scale for each expert, from the variance of independent tokens and a part that grows with
the load. Split conformal prediction: how many scales the bound lies above the mean is read off batches of held-out
sequences, by batch size. And two corrections that learn online from true loads: the drift of each expert's share
against its prediction, and the level itself (adaptive conformal inference). On text of another kind, a nominal 90 %
covers 50 to 80 % without either; the level alone gets there in the end, with bounds up to twice as high.

Shapes: n tokens, E experts, B batches, Z batch sizes, G levels of a grid, Q quantiles.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.metrics import checked_loads

# Levels at which the residuals' quantiles are kept: 0, 0.0025, ..., 1.
_GRID_SIZE = 401
# How many tokens' worth of no drift each expert starts with.
_DRIFT_PRIOR_TOKENS = 16.0
# Tokens squared, added to every variance: a load is an integer, and no bound should sit closer to its mean than that.
_ROUNDING_VARIANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class LoadBatches:
    """Predicted and true loads of batches of tokens, of any mix of sizes."""

    mean_BE: FloatArray
    """Predicted loads: sums of the tokens' probabilities."""
    variance_BE: FloatArray
    """Their variances if tokens were independent: sums of p (1 - p)."""
    load_BE: FloatArray
    num_tokens_B: IntArray

    def __post_init__(self) -> None:
        shape = (len(self.num_tokens_B), *self.load_BE.shape[1:])
        for name in ("mean_BE", "variance_BE", "load_BE"):
            values = getattr(self, name)
            if values.ndim != 2 or values.shape != shape:
                raise ValueError(f"{name} must have the shape (batches, experts) = {shape}, got {values.shape}")
            checked_loads(name, values)
        if len(self.num_tokens_B) and self.num_tokens_B.min() < 1:
            raise ValueError(f"num_tokens_B must be >= 1, got {self.num_tokens_B.min()}")

    def __len__(self) -> int:
        return len(self.num_tokens_B)


def load_moments(probabilities_nE: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The mean and the independent-tokens variance of a batch's load, each of shape (E,)."""
    mean_E: FloatArray = probabilities_nE.sum(axis=0)
    variance_E: FloatArray = mean_E - np.einsum("ne,ne->e", probabilities_nE, probabilities_nE)
    return mean_E, np.maximum(variance_E, 0)


def draw_batches(
    probabilities_nE: FloatArray,
    routing_nE: FloatArray,
    *,
    sizes: Sequence[int],
    batches_per_size: int = 200,
    sequence_starts: Sequence[int] | IntArray | None = None,
    seed: int = 0,
) -> LoadBatches:
    """Cut predicted tokens whose routing is known into batches, as decoding or as prefill would.

    Args:
        probabilities_nE, routing_nE: predicted and true (0 or 1) routing of the same tokens.
        sizes: tokens per batch; those of which the data hold not one batch are left out.
        sequence_starts: None draws the tokens of a batch from all over the data without replacement (shuffled again
            when they are used up), like decoding many sequences. Offsets (the first token of each sequence, and the
            end) make a batch a run of tokens of one sequence, in order, like a prefill chunk.
    Returns: at most `batches_per_size` batches of each size.
    Raises: ValueError if no size fits.
    """
    random = np.random.default_rng(seed)
    rows_of_sizes = [
        _shuffled_rows(len(routing_nE), size, batches_per_size, random)
        if sequence_starts is None
        else _contiguous_rows(np.asarray(sequence_starts), size, batches_per_size, random)
        for size in sizes
    ]
    rows_of_sizes = [rows_Bn for rows_Bn in rows_of_sizes if len(rows_Bn)]
    if not rows_of_sizes:
        raise ValueError(f"sizes must hold one that fits the data ({len(routing_nE)} tokens), got {tuple(sizes)}")
    # The sizes are mixed evenly, each in its own order.
    numbered = [(number / len(rows_Bn), rows_n) for rows_Bn in rows_of_sizes for number, rows_n in enumerate(rows_Bn)]
    batches = [rows_n for _, rows_n in sorted(numbered, key=itemgetter(0))]
    means, variances, loads = [], [], []
    for rows_n in batches:
        mean_E, variance_E = load_moments(probabilities_nE[rows_n].astype(np.float64))
        means.append(mean_E)
        variances.append(variance_E)
        loads.append(routing_nE[rows_n].sum(axis=0, dtype=np.float64))
    num_tokens_B = np.array([len(rows_n) for rows_n in batches])
    return LoadBatches(
        mean_BE=np.array(means), variance_BE=np.array(variances), load_BE=np.array(loads), num_tokens_B=num_tokens_B
    )


class LoadQuantile(BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """A calibrated upper bound of the load of each expert of one layer.

    Args:
        quantile: the share of loads that the bound covers, or several in ascending order.
        learning_rate: how fast the level follows the coverage seen in `update`; 0 leaves it as calibrated.
        drift_half_life_tokens: how fast what is known of the experts' drift fades; None: no drift is learned.

    Fitted attributes: `sizes_`, shape (Z,), batch sizes calibrated for; `residuals_`, shape (Z, G), quantiles of the
    residuals in units of the scale; `spread_`, the variance of the load's relative error beyond that of independent
    tokens; `miscoverage_`, shape (Z, Q), the level's distance from 1 as adapted; `drift_`, shape (E,), and
    `drift_tokens_`: true less predicted tokens, and of how many, both fading.
    Sources: split conformal prediction (Vovk et al. 2005); adaptive conformal inference (Gibbs and Candès 2021,
    arXiv 2106.00170), with one error a batch: the share of its experts above their bound.
    """

    sizes_: FloatArray
    residuals_: FloatArray
    spread_: float
    miscoverage_: FloatArray
    drift_: FloatArray
    drift_tokens_: float

    def __init__(
        self,
        quantile: float | Sequence[float] = 0.9,
        *,
        learning_rate: float = 0.05,
        drift_half_life_tokens: float | None = 1024.0,
    ) -> None:
        self.quantile = quantile
        self.learning_rate = learning_rate
        self.drift_half_life_tokens = drift_half_life_tokens

    def fit(self, batches: LoadBatches) -> Self:
        """Calibrate on batches, in the order in which they came, that the predictor of the means was not fitted on.

        Batch sizes within a factor of the root of 2 of a power of two are taken together.
        """
        self._restore_parameters()
        if not len(batches):
            raise ValueError("batches must hold at least one batch, got 0")
        self._forget_drift(batches.load_BE.shape[1])
        # What is calibrated is what will run: each batch is predicted with the drift known before it.
        corrected, variances = [], []
        for mean_E, variance_E, load_E, num_tokens in zip(
            batches.mean_BE, batches.variance_BE, batches.load_BE, batches.num_tokens_B.tolist(), strict=True
        ):
            corrected_E = self._corrected(mean_E, num_tokens)
            corrected.append(corrected_E)
            variances.append(self._variance(mean_E, variance_E, corrected_E, num_tokens))
            self._learn_drift(mean_E, load_E, num_tokens)
        mean_BE, variance_BE = np.array(corrected), np.array(variances)
        residual_BE = batches.load_BE - mean_BE
        excess = float((residual_BE**2 - variance_BE).sum())
        self.spread_ = max(0.0, excess) / max(float((mean_BE**2).sum()), 1e-12)
        scaled_BE = residual_BE / np.sqrt(variance_BE + self.spread_ * mean_BE**2 + _ROUNDING_VARIANCE)
        group_B = np.round(np.log2(batches.num_tokens_B)).astype(int)
        groups = np.unique(group_B)
        self.sizes_ = np.array([batches.num_tokens_B[group_B == group].mean() for group in groups])
        self.residuals_ = np.stack([_conformal_quantiles(scaled_BE[group_B == group]) for group in groups])
        self.miscoverage_ = np.tile(1 - self._quantiles_Q, (len(groups), 1))
        # The drift of the calibration's sequences is theirs: what comes may be of another kind.
        self._forget_drift(batches.load_BE.shape[1])
        self._restore()
        return self

    def upper(self, mean_E: ArrayLike, variance_E: ArrayLike, num_tokens: int) -> FloatArray:
        """The bound of each expert's load in a batch of `num_tokens`, in [0, num_tokens].

        Args:
            mean_E, variance_E: what `load_moments` makes of the batch's probabilities.
        Returns: shape (E,), or (Q, E) if `quantile` is a sequence.
        Raises: ValueError for another number of experts or no tokens.
        """
        mean_E, variance_E = self._checked(num_tokens, mean_E=mean_E, variance_E=variance_E)
        upper_QE = self._upper(mean_E, variance_E, num_tokens)
        return upper_QE[0] if np.ndim(self.quantile) == 0 else upper_QE

    def corrected_mean(self, mean_E: ArrayLike, num_tokens: int) -> FloatArray:
        """The predicted load with each expert's drift added, shape (E,), in [0, num_tokens].

        Where the traffic is of another kind than the predictor was fitted to, this is what keeps its forecasts good.
        """
        (mean_E,) = self._checked(num_tokens, mean_E=mean_E)
        return self._corrected(mean_E, num_tokens)

    def update(
        self,
        mean_E: ArrayLike,
        variance_E: ArrayLike,
        load_E: ArrayLike,
        num_tokens: int,
        *,
        upper: FloatArray | None = None,
    ) -> Self:
        """Learn from a batch whose true load is known: see what the bound would have covered, then move it.

        Args:
            upper: what `upper` gave for the batch, if it was asked and nothing was learned since; saves its time.
        """
        mean_E, variance_E, load_E = self._checked(num_tokens, mean_E=mean_E, variance_E=variance_E, load_E=load_E)
        if self.learning_rate > 0:
            upper_QE = self._upper(mean_E, variance_E, num_tokens) if upper is None else np.atleast_2d(upper)
            missed_Q = (load_E > upper_QE).mean(axis=1)
            step_Q = self.learning_rate * (1 - self._quantiles_Q - missed_Q)
            low, high, high_share = self._neighbours(num_tokens)
            self.miscoverage_ = self.miscoverage_.copy()  # the old array may have been handed out, or be read-only
            for row, share in ((low, 1 - high_share), (high, high_share)):
                # A bound of zero tokens covers more than the nominal share where most loads are zero. Without this
                # floor the level would sink for as long as batches are that small.
                self.miscoverage_[row] = np.minimum(
                    self.miscoverage_[row] + share * step_Q, np.sqrt(1 - self._quantiles_Q)
                )
        self._learn_drift(mean_E, load_E, num_tokens)
        return self

    def update_drift(self, mean_E: ArrayLike, load_E: ArrayLike, num_tokens: int) -> Self:
        """Learn the drift from a batch's true load, and nothing of the level: a third of the cost of `update`."""
        mean_E, load_E = self._checked(num_tokens, mean_E=mean_E, load_E=load_E)
        self._learn_drift(mean_E, load_E, num_tokens)
        return self

    def _forget_drift(self, num_experts: int) -> None:
        self.drift_ = np.zeros(num_experts)
        self.drift_tokens_ = 0.0

    def _learn_drift(self, mean_E: FloatArray, load_E: FloatArray, num_tokens: int) -> None:
        if self.drift_half_life_tokens is not None:
            fade = 0.5 ** (num_tokens / self.drift_half_life_tokens)
            self.drift_ = self.drift_ * fade + (load_E - mean_E)
            self.drift_tokens_ = self.drift_tokens_ * fade + num_tokens

    def _upper(self, mean_E: FloatArray, variance_E: FloatArray, num_tokens: int) -> FloatArray:
        corrected_E = self._corrected(mean_E, num_tokens)
        variance_E = self._variance(mean_E, variance_E, corrected_E, num_tokens)
        scale_E = np.sqrt(variance_E + self.spread_ * corrected_E**2 + _ROUNDING_VARIANCE)
        steps_Q1 = self._scales_above_mean(num_tokens)[:, np.newaxis]
        upper_QE: FloatArray = np.clip(corrected_E + steps_Q1 * scale_E, 0, num_tokens)
        # Levels adapt one by one and might cross.
        return np.maximum.accumulate(upper_QE, axis=0) if len(upper_QE) > 1 else upper_QE

    def _variance(
        self, mean_E: FloatArray, variance_E: FloatArray, corrected_E: FloatArray, num_tokens: int
    ) -> FloatArray:
        """The variance of independent tokens around the corrected mean."""
        if self.drift_half_life_tokens is None:
            return variance_E
        binomial_E = corrected_E * np.maximum(1 - corrected_E / num_tokens, 0)
        # The variance was that of the mean before the correction, and the correction is an estimate from few tokens.
        followed_E = variance_E * (binomial_E + 1e-3) / (mean_E * np.maximum(1 - mean_E / num_tokens, 0) + 1e-3)
        around_E: FloatArray = followed_E + binomial_E * (num_tokens / (self.drift_tokens_ + _DRIFT_PRIOR_TOKENS))
        return around_E

    def _corrected(self, mean_E: FloatArray, num_tokens: int) -> FloatArray:
        if self.drift_tokens_ == 0:
            return mean_E
        drift_E = self.drift_ * (num_tokens / (self.drift_tokens_ + _DRIFT_PRIOR_TOKENS))
        corrected_E: FloatArray = np.clip(mean_E + drift_E, 0, num_tokens)
        return corrected_E

    def _scales_above_mean(self, num_tokens: int) -> FloatArray:
        """Interpolate, between neighbouring sizes, how many scales the bound lies above the mean, shape (Q,)."""
        low, high, high_share = self._neighbours(num_tokens)
        steps = [
            (1 - high_share) * self._at_level(low, quantile) + high_share * self._at_level(high, quantile)
            for quantile in range(len(self._quantiles_Q))
        ]
        return np.array(steps)

    def _at_level(self, size: int, quantile: int) -> float:
        miscoverage = float(self.miscoverage_[size, quantile])
        residuals_G = self.residuals_[size]
        if miscoverage < 0:
            # Even the largest residual of the calibration does not cover: go on in proportion.
            largest = float(residuals_G[-1])
            return largest - max(largest, 1.0) * miscoverage / (1 - float(self._quantiles_Q[quantile]))
        position = (1 - miscoverage) * (_GRID_SIZE - 1)
        below = min(int(position), _GRID_SIZE - 2)
        above_share = position - below
        return float((1 - above_share) * residuals_G[below] + above_share * residuals_G[below + 1])

    def _neighbours(self, num_tokens: int) -> tuple[int, int, float]:
        """The calibrated sizes on either side, and how near the size is to the upper one on a log scale, 0 to 1."""
        high = bisect_right(self._sizes, num_tokens)
        if high == 0 or high == len(self._sizes):
            nearest = min(high, len(self._sizes) - 1)
            return nearest, nearest, 0.0
        below, above = self._sizes[high - 1], self._sizes[high]
        return high - 1, high, float(np.log(num_tokens / below) / np.log(above / below))

    def _checked(self, num_tokens: int, **values: ArrayLike) -> list[FloatArray]:
        check_is_fitted(self)
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be >= 1, got {num_tokens}")
        checked: list[FloatArray] = [np.asarray(value, dtype=np.float64) for value in values.values()]
        for name, value_E in zip(values, checked, strict=True):
            if value_E.shape != self.drift_.shape:
                raise ValueError(f"{name} must have the shape {self.drift_.shape} as when fitted, got {value_E.shape}")
            checked_loads(name, value_E)
        return checked

    def _restore_parameters(self) -> None:
        quantiles_Q = np.atleast_1d(np.asarray(self.quantile, dtype=np.float64))
        if not (len(quantiles_Q) and (quantiles_Q > 0).all() and (quantiles_Q < 1).all()):
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
        if not (np.diff(quantiles_Q) > 0).all():
            raise ValueError(f"quantile must be in ascending order, got {self.quantile}")
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate must be >= 0, got {self.learning_rate}")
        if self.drift_half_life_tokens is not None and not self.drift_half_life_tokens > 0:
            raise ValueError(f"drift_half_life_tokens must be > 0 or None, got {self.drift_half_life_tokens}")
        self._quantiles_Q: FloatArray = quantiles_Q

    def _restore(self) -> None:
        """Rebuild what is derived from parameters and fitted attributes. Raises ValueError where they do not fit."""
        self._restore_parameters()
        num_sizes = len(self.sizes_)
        for name, shape in (
            ("residuals_", (num_sizes, _GRID_SIZE)),
            ("miscoverage_", (num_sizes, len(self._quantiles_Q))),
        ):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {getattr(self, name).shape}")
        self._sizes: list[float] = self.sizes_.tolist()


def _conformal_quantiles(scaled_BE: FloatArray) -> FloatArray:
    """The residuals' quantiles at the grid's levels, shape (G,), each raised by what one more batch could change."""
    levels_G = np.linspace(0, 1, _GRID_SIZE) * (1 + 1 / len(scaled_BE))
    quantiles_G: FloatArray = np.quantile(scaled_BE, np.minimum(levels_G, 1), method="higher")
    return quantiles_G


def _shuffled_rows(num_tokens: int, size: int, num_batches: int, random: np.random.Generator) -> IntArray:
    """Rows of each batch, shape (B, size)."""
    per_shuffle = num_tokens // size
    if per_shuffle == 0:
        return np.empty((0, size), dtype=np.intp)
    shuffles = [
        random.permutation(num_tokens)[: per_shuffle * size].reshape(per_shuffle, size)
        for _ in range(-(-num_batches // per_shuffle))
    ]
    return np.concatenate(shuffles)[:num_batches]


def _contiguous_rows(starts_S1: IntArray, size: int, num_batches: int, random: np.random.Generator) -> IntArray:
    """Rows of each batch, shape (B, size), in the data's order; `num_batches` of them at random."""
    first_B = np.concatenate(
        [np.arange(start, end - size + 1, size) for start, end in pairwise(starts_S1)] or [np.empty(0, dtype=np.intp)]
    )
    if len(first_B) > num_batches:
        first_B = np.sort(random.permutation(first_B)[:num_batches])
    rows_Bn: IntArray = first_B[:, np.newaxis] + np.arange(size)
    return rows_Bn
