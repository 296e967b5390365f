"""Forecasts that a simulated system gets: from the past as control makes them, or from the tokens to come.

A live predictor forecasts within a step, layer by layer, for the very tokens that will be computed. Here the forecast
is made at the tick, for the tokens until the next one. So foresight bounds every predictor, and a predictor is
foresight with mistakes: of a given size, or those of fitted predictors.

Shapes: L MoE layers, E experts, C = L x E cells, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.planning.forecasts import PopularityForecaster, with_upper_bound
from moeless.planning.load_history import LoadHistory, WindowLoad
from moeless.simulate.routing import SequenceRouting

ForecastKind = Literal["window", "popularity", "foresight", "predictor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """Forecasts of one system."""

    kind: ForecastKind = "window"
    """window: as in the last window. popularity: the running share of each expert. foresight: the tokens to come.
    predictor: what fitted predictors forecast for the tokens to come."""
    quantile: float = 0.9
    """Of a step's load, for the upper forecast."""
    half_life_s: float = 60.0
    """Of popularity."""
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


class Upcoming(Protocol):
    """Looks at the requests that run, wait and will arrive."""

    def __call__(self, spans: SpanCounts, horizon_s: float) -> tuple[FloatArray, int]:
        """Tokens per function in the time to come, shape (C,), and the number of steps that they take."""
        ...


class Forecaster:
    """Makes the forecasts of one system. Seeded; each forecast draws new errors."""

    def __init__(
        self, config: ForecastConfig, routing: SequenceRouting, predicted: SpanCounts | None = None, *, seed: int = 0
    ) -> None:
        if config.kind == "predictor" and predicted is None:
            raise ConfigError("forecast.kind predictor needs predictors, got none")
        self._config = config
        self._spans: SpanCounts = predicted if config.kind == "predictor" and predicted is not None else routing
        self._shape = (routing.num_layers, routing.num_experts)
        self._rng = np.random.default_rng(seed)
        self._popularity = PopularityForecaster(routing.num_cells, half_life_s=config.half_life_s)

    def forecast(
        self, now_s: float, horizon_s: float, history: LoadHistory, window: WindowLoad, upcoming: Upcoming
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and upper forecast of the tokens per step, shape (L, E) each.

        The mean is token-weighted: rare prefill steps carry most of the work.
        """
        if self._config.kind == "window":
            mean_C = window.mean_C
        elif self._config.kind == "popularity":
            mean_C = self._popularity.mean_C(now_s, history, window)
        else:
            tokens_C, num_steps = upcoming(self._spans, horizon_s)
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
