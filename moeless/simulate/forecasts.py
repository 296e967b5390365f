"""Forecasts that a simulated system gets: those that it could have, and foresight, which bounds them.

window and popularity come from the load that was seen. predictor is what fitted predictors said of the last tokens of
the requests that run, corrected for drift: at a tick the tokens to come do not exist yet, nor does anyone know how long
answers get or what arrives. foresight knows all of it; with errors of a given size it stands for a predictor that is
assumed.

Shapes: L MoE layers, E experts, C = L x E cells, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.planning.forecasts import PopularityForecaster, with_upper_bound
from moeless.planning.load_history import LoadHistory, WindowLoad
from moeless.simulate.routing import SequenceRouting
from moeless_predictors.quantile import LoadQuantile

ForecastKind = Literal["window", "popularity", "foresight", "predictor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """Forecasts of one system."""

    kind: ForecastKind = "window"
    """window: as in the last window. popularity: the running share of each expert. foresight: the tokens to come.
    predictor: by what fitted predictors said of the last tokens of each request that runs."""
    quantile: float = 0.9
    """Quantile of a step's load that the upper forecast covers."""
    half_life_s: float = 60.0
    """Half-life of popularity's counts."""
    recall: float = 1.0
    """foresight: share of the tokens forecast for the right expert; the others go to experts drawn at random."""
    relative_l1: float = 0.0
    """foresight: mean relative error of an expert's load, log-normal."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.quantile < 1:
            raise ConfigError(f"forecast.quantile must be from 0.5 to below 1, got {self.quantile}")
        if not self.half_life_s > 0:
            raise ConfigError(f"forecast.half_life_s must be above 0, got {self.half_life_s}")
        if not 0 <= self.recall <= 1:
            raise ConfigError(f"forecast.recall must be from 0 to 1, got {self.recall}")
        if not 0 <= self.relative_l1 < 2:
            raise ConfigError(f"forecast.relative_l1 must be from 0 to below 2, got {self.relative_l1}")


class SpanCounts(Protocol):
    """Tokens per function of a part of a request: SequenceRouting, true or predicted."""

    def of_span(self, sequence: int, first: int, num_tokens: int) -> NDArray[Any]:
        """Shape (C,)."""
        ...


Upcoming = Callable[[float], tuple[FloatArray, int]]
"""Tokens per function in the seconds to come, shape (C,), and the number of steps that they take."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PredictedRouting:
    """Forecasts of fitted predictors for the simulated routing."""

    spans: SpanCounts
    recall: float
    """Share of the true experts among those predicted."""
    drift_of: Mapping[int, LoadQuantile] = field(default_factory=dict)
    """By layer: corrects loads for the drift of the traffic, as a server does. Layers without one are not corrected."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Future:
    """Future load: the true one, and the one expected of the requests that are there."""

    true: Upcoming
    expected: Upcoming
    """Expected load of running requests, by their predicted recent tokens and the mean answer's length so far."""


class Forecaster:
    """Makes the forecasts of one system. Seeded; each forecast draws new errors."""

    def __init__(
        self,
        config: ForecastConfig,
        routing: SequenceRouting,
        predicted: PredictedRouting | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if config.kind == "predictor" and predicted is None:
            raise ConfigError("forecast.kind predictor needs predictors, got none")
        self._config = config
        self._shape = (routing.num_layers, routing.num_experts)
        self._drift = None
        if config.kind == "predictor" and predicted is not None:
            self._drift = _Drift(predicted.drift_of, self._shape, routing.top_k)
        self._rng = np.random.default_rng(seed)
        self._popularity = PopularityForecaster(routing.num_cells, half_life_s=config.half_life_s)

    def forecast(
        self, now_s: float, horizon_s: float, history: LoadHistory, window: WindowLoad, future: Future
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and upper forecast of the tokens per step, shape (L, E) each.

        The mean is token-weighted: rare prefill steps carry most of the work.
        """
        if self._config.kind == "window":
            mean_C = window.mean_C
        elif self._config.kind == "popularity":
            mean_C = self._popularity.mean_C(now_s, history, window)
        elif self._drift is not None:
            self._drift.learn(history.total_C)
            expected_C, num_steps = future.expected(horizon_s)
            mean_C = expected_C / max(1, num_steps)
            # Requests that wait or arrive have no tokens that predictors saw: popularity stands in for them.
            popular_C = self._popularity.mean_C(now_s, history, window)
            missing = max(0.0, 1 - float(mean_C.sum()) / max(float(popular_C.sum()), 1e-9))
            mean_C = self._drift.corrected(mean_C + missing * popular_C)
        else:
            tokens_C, num_steps = future.true(horizon_s)
            mean_C = self._with_errors(tokens_C / max(1, num_steps))
        mean_C, upper_C = with_upper_bound(mean_C, window, quantile=self._config.quantile)
        return mean_C.reshape(self._shape), upper_C.reshape(self._shape)

    def _with_errors(self, mean_C: FloatArray) -> FloatArray:
        config = self._config
        load_LE = mean_C.reshape(self._shape)
        total_L1 = load_LE.sum(axis=1, keepdims=True)
        if config.recall < 1:
            load_LE = config.recall * load_LE + (1 - config.recall) * self._rng.permuted(load_LE, axis=1)
        if config.relative_l1 > 0:
            # The mean |X - 1| of a log-normal X of mean 1 is 2 (2 Phi(sigma / 2) - 1).
            sigma = 2 * NormalDist().inv_cdf((config.relative_l1 / 2 + 1) / 2)
            load_LE = load_LE * np.exp(sigma * self._rng.standard_normal(self._shape) - sigma**2 / 2)
            sum_L1 = load_LE.sum(axis=1, keepdims=True)
            load_LE = load_LE * np.divide(total_L1, sum_L1, out=np.zeros_like(sum_L1), where=sum_L1 > 0)
        return load_LE.reshape(-1)


class _Drift:
    """Adds to each layer's forecast what the tokens since the last ones went elsewhere, as a live server does.

    Args:
        drift_of: by layer; copied, since they learn.
    """

    def __init__(self, drift_of: Mapping[int, LoadQuantile], shape: tuple[int, int], top_k: int) -> None:
        self._drift_of = {layer: deepcopy(quantile) for layer, quantile in drift_of.items()}
        self._shape, self._top_k = shape, top_k
        self._seen_C: FloatArray = np.zeros(shape[0] * shape[1])
        self._forecast_LE: FloatArray | None = None

    def learn(self, total_C: FloatArray) -> None:
        """Compare the last forecast with the tokens that came since."""
        true_LE = (total_C - self._seen_C).reshape(self._shape)
        self._seen_C = total_C.copy()
        if self._forecast_LE is None:
            return
        for layer, quantile in self._drift_of.items():
            num_tokens = round(float(true_LE[layer].sum()) / self._top_k)
            forecast = float(self._forecast_LE[layer].sum())
            if num_tokens > 0 and forecast > 0:
                mean_E = self._forecast_LE[layer] * (num_tokens * self._top_k / forecast)
                quantile.update_drift(mean_E, true_LE[layer], num_tokens)

    def corrected(self, mean_C: FloatArray) -> FloatArray:
        """Tokens per step with the drift added; each layer keeps its sum."""
        mean_LE = mean_C.reshape(self._shape)
        self._forecast_LE = mean_LE
        corrected_LE = mean_LE.copy()
        for layer, quantile in self._drift_of.items():
            total = float(mean_LE[layer].sum())
            num_tokens = max(1, round(total / self._top_k))
            if total > 0:
                found_E = quantile.corrected_mean(mean_LE[layer] * (num_tokens * self._top_k / total), num_tokens)
                corrected_LE[layer] = found_E * (total / max(float(found_E.sum()), 1e-9))
        return corrected_LE.reshape(-1)
