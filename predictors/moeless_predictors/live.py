"""Forecasts in a running server: at each MoE layer, the load that the batch will put on the layer `distance` ahead.

Called by the engine's observer, layer by layer. Popularity learns online, with decay, in every step that is followed.
Some of these steps are measured as well: they give the running accuracy, calibrate the bounds online, and decide
whether the predictor still beats popularity. One that does not is switched off for its layer, and popularity's
forecast takes its place.

Forecasting is limited to a share of the steps' time: after a step that is followed, the next one is followed once that
time is earned back. From the steps between only the routing is kept, which gives the same forecasts as following all.

Shapes: n tokens of a step, E experts, k experts per token, H hidden size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_predictors.arrays import BoolArray, FloatArray, IntArray
from moeless_predictors.base import num_found, one_hot
from moeless_predictors.features import choice_values
from moeless_predictors.live_features import LiveFeatures, StepRows
from moeless_predictors.popularity import HALF_LIFE_TOKENS, OnlinePopularity
from moeless_predictors.predictor_set import PairPredictor, PredictorSet
from moeless_predictors.quantile import load_moments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """Raises ValueError for a value out of range."""

    distance: int = 1
    """How many MoE layers ahead."""
    max_share: float = 0.015
    """Of the time between a step's begin and its end, what forecasting may take on average; 1 follows every step. What
    it then costs a decode step is up to a quarter more: between layers it takes caches from the model."""
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
    """What a layer is expected to get in the step that is under way."""

    layer: int
    num_tokens: int
    kind: str
    """Of the predictor that made it."""
    load_E: FloatArray
    """Expected tokens of each expert."""
    upper_E: FloatArray | None = None
    """The calibrated bound of each; in measured steps only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccuracy:
    """How a layer's forecasts did, over the last window of measured steps; NaN before the first."""

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


class LivePredictor:
    """Forecasts of one engine. Belongs to the thread that computes; `latest` and `accuracy` may be called from any.

    Args:
        clock: seconds, for the share of the steps' time.
    Raises ValueError if the set has no predictor for `config.distance`.
    """

    def __init__(
        self,
        predictors: PredictorSet,
        config: LiveConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config = config or LiveConfig()
        if config.distance not in predictors.distances:
            raise ValueError(
                f"distance must be one that the predictors were fitted for "
                f"({', '.join(map(str, predictors.distances))}), got {config.distance}"
            )
        self._predictors = predictors
        self._num_experts = predictors.num_experts
        self._layers = {
            layer: _LayerForecaster(pair, config)
            for (layer, distance), pair in predictors.pairs.items()
            if distance == config.distance
        }
        self._features: LiveFeatures | None = None
        if any(forecaster.pair.kind == "history" for forecaster in self._layers.values()):
            self._features = LiveFeatures(
                predictors.features,
                num_layers=predictors.num_layers,
                num_experts=predictors.num_experts,
                top_k=predictors.top_k,
            )
        self._num_steps = self._num_followed = 0
        self._is_followed = False
        self._is_measured = False
        self._is_prefill = False
        self._clock = clock
        self._began_s = self._spent_s = self._owed_s = 0.0
        self._warm_up()

    def begin_step(self, rows: Sequence[StepRows]) -> None:
        """The rows of the next forward pass, in order."""
        self._began_s = self._clock()
        self._is_followed = self._owed_s <= 0
        self._is_measured = self._is_followed and self._num_followed % self._config.measure_every == 0
        self._is_prefill = any(item.num_rows > 1 for item in rows)
        self._num_followed += self._is_followed
        for forecaster in self._layers.values():
            forecaster.pending = forecaster.pending_mean_E = None
        if self._features is not None:
            self._features.begin_step(rows, is_followed=self._is_followed)
        self._spent_s += self._clock() - self._began_s

    def observe(
        self, layer: int, experts_nk: IntArray, weights_nk: FloatArray, hidden: Callable[[], Any]
    ) -> LoadForecast | None:
        """What `layer` was routed; layers come in order.

        Args:
            hidden: gives the hidden states at its experts' input, shape (n, H), as torch has them; asked for a gate.
        Returns: the forecast for layer + distance, or None if nothing predicts that or the step is not followed.
        """
        started_s = self._clock()
        if self._is_followed:
            below = self._layers.get(layer - self._config.distance)
            if below is not None:
                below.settle(experts_nk, is_prefill=self._is_prefill)
        if self._features is not None:
            self._features.observe(layer, experts_nk, weights_nk)
        forecaster, forecast = self._layers.get(layer), None
        if forecaster is not None and self._is_followed:
            forecast = forecaster.forecast(
                self._probabilities(forecaster, experts_nk, weights_nk, hidden),
                len(experts_nk),
                is_measured=self._is_measured,
                is_prefill=self._is_prefill,
            )
            forecaster.seconds += self._clock() - started_s
        self._spent_s += self._clock() - started_s
        return forecast

    def end_step(self) -> None:
        """Every layer was observed."""
        started_s = self._clock()
        if self._features is not None:
            self._features.end_step()
        ended_s = self._clock()
        # No more than a step's share is saved up: a long time without forecasts does not pay for many at once.
        earned_s = self._config.max_share * (ended_s - self._began_s)
        self._owed_s = max(-earned_s, self._owed_s + self._spent_s + ended_s - started_s - earned_s)
        self._spent_s = 0.0
        self._num_steps += 1

    def forget(self, sequence_id: str) -> None:
        """The sequence ended."""
        if self._features is not None:
            self._features.forget(sequence_id)

    @property
    def num_steps(self) -> int:
        """Steps that ended, followed or not."""
        return self._num_steps

    def latest(self, layer: int) -> LoadForecast | None:
        """The newest forecast for `layer` that has its bound."""
        forecaster = self._layers.get(layer - self._config.distance)
        return None if forecaster is None else forecaster.latest

    def accuracy(self) -> list[LayerAccuracy]:
        """Of every layer that is predicted, in order."""
        return [self._layers[layer].accuracy() for layer in sorted(self._layers)]

    def _warm_up(self) -> None:
        """Have what is compiled compiled now, on copies, not between two layers of the first steps."""
        predictors = self._predictors
        shape = {"num_layers": predictors.num_layers, "num_experts": predictors.num_experts, "top_k": predictors.top_k}
        features = LiveFeatures(predictors.features, **shape, num_slots=1)
        experts_nk = np.arange(predictors.top_k)[np.newaxis]
        weights_nk = np.ones(experts_nk.shape, dtype=np.float32)
        pair_of_kind = {forecaster.pair.kind: forecaster.pair for forecaster in self._layers.values()}
        for position in range(2):
            features.begin_step([StepRows("", 1, position)])
            for layer in range(predictors.num_layers):
                features.observe(layer, experts_nk, weights_nk)
                for kind, pair in pair_of_kind.items():
                    if layer != pair.layer:
                        continue
                    X_nF = np.zeros((1, pair.predictor.n_features_in_), dtype=np.float32)
                    if kind == "history":
                        X_nF = features.features(layer, pair.target)
                    forecaster = _LayerForecaster(pair, self._config)
                    probabilities_nE = None if kind == "popularity" else pair.predictor.fast_proba(X_nF)
                    forecaster.forecast(probabilities_nE, 1, is_measured=True, is_prefill=False)
                    forecaster.settle(experts_nk, is_prefill=False)
            features.end_step()

    def _probabilities(
        self, forecaster: _LayerForecaster, experts_nk: IntArray, weights_nk: FloatArray, hidden: Callable[[], Any]
    ) -> FloatArray | None:
        """Of the pair's predictor, shape (n, E); None where popularity is asked."""
        pair = forecaster.pair
        if not forecaster.is_active or pair.kind == "popularity":
            return None
        if pair.kind == "history":
            assert self._features is not None
            return pair.predictor.fast_proba(self._features.features(pair.layer, pair.target))
        if pair.kind == "gate":
            predictor: Any = pair.predictor
            return np.asarray(predictor.forward(hidden()))
        values_nE = one_hot(experts_nk, self._num_experts, values_nk=choice_values(weights_nk))
        return pair.predictor.fast_proba(values_nE)


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


class _LayerForecaster:
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
