"""Forecasts of one pair of layers in a running server, and how accurate they are.

Called by live.py: `forecast` when the source layer has been routed, `settle` when the target layer has.

Shapes: n tokens of a step, E experts, k experts per token.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np

from moeless_predictors.arrays import BoolArray, FloatArray, IntArray
from moeless_predictors.base import num_found
from moeless_predictors.popularity import HALF_LIFE_TOKENS, OnlinePopularity
from moeless_predictors.predictor_set import PairPredictor
from moeless_predictors.quantile import load_moments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """Raises ValueError for a value out of range."""

    distance: int = 1
    """MoE layers ahead."""
    max_share: float = 0.015
    """Share of the steps' time that forecasting may take on average; 1 follows every step. The cost to a decode step is
    up to a quarter more, because forecasting between layers takes caches from the model."""
    measure_every: int = 8
    """One in this many followed steps is measured: recall, errors, coverage and width are noted, and the bounds learn.
    Measuring costs about as much as predicting. Popularity and the predictor's drift are learned in every followed
    step."""
    window: int = 64
    """Measured steps over which a predictor must do no worse than popularity."""
    retry_after: int = 16
    """Windows after which a predictor that was switched off is tried for one more; traffic may have come back to what
    it was fitted on."""
    popularity_half_life_tokens: float = HALF_LIFE_TOKENS
    """Pace at which popularity follows the traffic: in followed steps, a token counts half as much as one that came
    this many tokens later."""

    def __post_init__(self) -> None:
        for name in ("distance", "measure_every", "window", "retry_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share must be above 0 and at most 1, got {self.max_share}")
        if not self.popularity_half_life_tokens > 0:
            raise ValueError(f"popularity_half_life_tokens must be > 0, got {self.popularity_half_life_tokens}")


@dataclass(frozen=True, slots=True, eq=False)
class LoadForecast:
    """Expected load of a layer in the current step."""

    layer: int
    num_tokens: int
    kind: str
    """Kind of the predictor that made it."""
    load_E: FloatArray
    """Expected tokens of each expert."""
    upper_E: FloatArray | None = None
    """The calibrated bound of each; in measured steps only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccuracy:
    """Accuracy of a layer's forecasts over the last window of measured steps; NaN before the first."""

    layer: int
    """The layer that is predicted."""
    distance: int
    kind: str
    reason: str
    """Why this kind was chosen when the predictors were fitted."""
    is_active: bool
    """False while popularity stands in."""
    recall: float
    load_error: float
    """Relative L1 error of the load, and `popularity_error` that of popularity that learns online."""
    popularity_error: float
    coverage: float
    """Share of the experts whose load was at most the bound."""
    bound_width: float
    """The bound's sum over the load's, and `popularity_bound_width` that of popularity's own bound."""
    popularity_bound_width: float
    num_forecasts: int
    """Since the start, as is `seconds`, the time they took."""
    seconds: float


@dataclass(slots=True, eq=False)
class _Pending:
    forecast: LoadForecast
    mean_E: FloatArray
    """Before the correction for drift."""
    variance_E: FloatArray
    upper_E: FloatArray
    popularity_E: FloatArray
    popularity_variance_E: FloatArray
    popularity_upper_E: FloatArray
    probabilities_nE: FloatArray | None


@dataclass(slots=True, eq=False)
class _Sample:
    error: float
    popularity_error: float
    recall: float
    coverage: float
    bound_width: float
    popularity_bound_width: float


class LayerForecaster:
    """One pair of layers: its predictor, popularity beside it, and the accuracy of both."""

    def __init__(self, pair: PairPredictor, config: LiveConfig) -> None:
        self.pair = pair
        self.is_active = True
        self.pending: _Pending | None = None
        self.pending_mean_E: FloatArray | None = None
        """The forecast of a step that is not measured, before the correction for drift."""
        self.latest: LoadForecast | None = None
        self.seconds = 0.0
        self._config = config
        self._num_forecasts = 0
        self._top_k = pair.predictor.top_k_
        # Tokens of a prompt err together, those of a decoding batch each for itself.
        both = (False, True)
        self._quantiles = {is_prefill: copy.deepcopy(pair.quantile) for is_prefill in both}
        self._popularity_quantiles = {is_prefill: copy.deepcopy(pair.popularity_quantile) for is_prefill in both}
        self._popularity = OnlinePopularity(pair.popularity, half_life_tokens=config.popularity_half_life_tokens)
        self._samples: deque[_Sample] = deque(maxlen=config.window)
        self._num_settled_while_off = 0

    def forecast(
        self, probabilities_nE: FloatArray | None, num_tokens: int, *, is_measured: bool, is_prefill: bool
    ) -> LoadForecast:
        """Make the forecast, and keep what measuring it will need."""
        self._num_forecasts += 1
        kind = "popularity" if probabilities_nE is None else self.pair.kind
        if probabilities_nE is not None:
            probabilities_nE = self._without_faults(probabilities_nE)
        if not is_measured:
            if probabilities_nE is None:
                return LoadForecast(self.pair.target, num_tokens, kind, self._popularity.load(num_tokens))
            mean_E = probabilities_nE.sum(axis=0)
            self.pending_mean_E = mean_E
            corrected_E = self._quantiles[is_prefill].corrected_mean(mean_E, num_tokens)
            return LoadForecast(self.pair.target, num_tokens, kind, corrected_E)
        popularity_E = self._popularity.load(num_tokens)
        popularity_variance_E: FloatArray = popularity_E * (1 - popularity_E / num_tokens)
        popularity_upper_E = self._popularity_quantiles[is_prefill].upper(
            popularity_E, popularity_variance_E, num_tokens
        )
        if probabilities_nE is None:
            # Popularity follows the traffic by itself: its forecast is not corrected for drift a second time.
            mean_E, variance_E, corrected_E, upper_E = (
                popularity_E,
                popularity_variance_E,
                popularity_E,
                popularity_upper_E,
            )
        else:
            quantile = self._quantiles[is_prefill]
            mean_E, variance_E = load_moments(probabilities_nE)
            corrected_E = quantile.corrected_mean(mean_E, num_tokens)
            upper_E = quantile.upper(mean_E, variance_E, num_tokens)
        forecast = LoadForecast(self.pair.target, num_tokens, kind, corrected_E, upper_E)
        self.latest = forecast
        self.pending = _Pending(
            forecast,
            mean_E,
            variance_E,
            upper_E,
            popularity_E,
            popularity_variance_E,
            popularity_upper_E,
            probabilities_nE,
        )
        return forecast

    def _without_faults(self, probabilities_nE: FloatArray) -> FloatArray:
        """NaN of one token (its hidden state or gate weights were not finite) must not reach the layer's forecast."""
        if np.isfinite(np.add.reduce(probabilities_nE, axis=None)):
            return probabilities_nE
        is_fault_n: BoolArray = ~np.logical_and.reduce(np.isfinite(probabilities_nE), axis=1)
        return np.where(is_fault_n[:, np.newaxis], self._popularity.load(1), probabilities_nE)

    def settle(self, experts_nk: IntArray, *, is_prefill: bool) -> None:
        """Learn from the load that came; if the step is measured, compare the pending forecast with it."""
        pending, self.pending = self.pending, None
        mean_E, self.pending_mean_E = self.pending_mean_E, None
        num_tokens, num_experts = len(experts_nk), len(self._popularity.counts_E)
        load_E = np.bincount(experts_nk.ravel(), minlength=num_experts).astype(np.float64)
        if pending is not None and pending.forecast.num_tokens == num_tokens:
            self._measure(pending, experts_nk, load_E, is_prefill=is_prefill)
        elif mean_E is not None:
            self._quantiles[is_prefill].update_drift(mean_E, load_E, num_tokens)
        self._popularity.learn(load_E, num_tokens)

    def _measure(self, pending: _Pending, experts_nk: IntArray, load_E: FloatArray, *, is_prefill: bool) -> None:
        forecast, num_experts = pending.forecast, len(load_E)
        total = load_E.sum()
        scores_nE = pending.probabilities_nE
        if scores_nE is None:
            scores_nE = np.broadcast_to(pending.popularity_E, (len(experts_nk), num_experts))
        self._samples.append(
            _Sample(
                error=float(np.abs(forecast.load_E - load_E).sum() / total),
                popularity_error=float(np.abs(pending.popularity_E - load_E).sum() / total),
                recall=num_found(np.ascontiguousarray(scores_nE), np.ascontiguousarray(experts_nk, dtype=np.int64))
                / experts_nk.size,
                coverage=float((load_E <= pending.upper_E).mean()),
                bound_width=float(pending.upper_E.sum() / total),
                popularity_bound_width=float(pending.popularity_upper_E.sum() / total),
            )
        )
        if pending.probabilities_nE is not None:
            self._quantiles[is_prefill].update(
                pending.mean_E, pending.variance_E, load_E, len(experts_nk), upper=pending.upper_E
            )
        self._popularity_quantiles[is_prefill].update(
            pending.popularity_E,
            pending.popularity_variance_E,
            load_E,
            len(experts_nk),
            upper=pending.popularity_upper_E,
        )
        self._judge()

    def accuracy(self) -> LayerAccuracy:
        samples = list(self._samples)
        mean = {
            name: float(np.mean([getattr(sample, name) for sample in samples])) if samples else float("nan")
            for name in _Sample.__slots__
        }
        return LayerAccuracy(
            layer=self.pair.target,
            distance=self.pair.distance,
            kind=self.pair.kind,
            reason=self.pair.choice.reason,
            is_active=self.is_active,
            recall=mean["recall"],
            load_error=mean["error"],
            popularity_error=mean["popularity_error"],
            coverage=mean["coverage"],
            bound_width=mean["bound_width"],
            popularity_bound_width=mean["popularity_bound_width"],
            num_forecasts=self._num_forecasts,
            seconds=self.seconds,
        )

    def _judge(self) -> None:
        """Switch the predictor off if it did worse than popularity over a whole window, and on again for a trial."""
        if self.pair.kind == "popularity":
            return
        if not self.is_active:
            self._num_settled_while_off += 1
            if self._num_settled_while_off >= self._config.retry_after * self._config.window:
                self.is_active = True
                self._samples.clear()
                logger.info("predictor tried again layer=%d kind=%s", self.pair.target, self.pair.kind)
            return
        if len(self._samples) < self._config.window:
            return
        error = float(np.mean([sample.error for sample in self._samples]))
        popularity_error = float(np.mean([sample.popularity_error for sample in self._samples]))
        if error > popularity_error:
            self.is_active = False
            self._num_settled_while_off = 0
            logger.warning(
                "predictor switched off layer=%d distance=%d kind=%s load_error=%.3f popularity=%.3f window=%d",
                self.pair.target,
                self.pair.distance,
                self.pair.kind,
                error,
                popularity_error,
                self._config.window,
            )
