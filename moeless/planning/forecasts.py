"""Forecasts of the load to come from the load that was seen: the last window's, or each function's popularity.

Called by the simulator and by control, which observes what LoadHistory holds. Pure.

Shapes: C cells (functions, layer by layer).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.planning.load_history import LoadHistory, WindowLoad


class Forecast(NamedTuple):
    """Tokens per step, shape (C,) each: token-weighted means, as Observation describes them."""

    mean_C: FloatArray
    upper_C: FloatArray
    """At the quantile."""


def with_upper_bound(mean_C: FloatArray, window: WindowLoad, *, quantile: float) -> Forecast:
    """The forecast of a mean over steps, with the window's burst and dispersion.

    Args:
        mean_C: forecast tokens per step.
        quantile: of a step's tokens, for the upper bound: normal around the mean, with the window's variance over mean.
    """
    mean_C = mean_C * window.burst
    return Forecast(mean_C, mean_C + NormalDist().inv_cdf(quantile) * np.sqrt(window.dispersion_C * mean_C))


def forecast_from_window(window: WindowLoad, *, quantile: float) -> Forecast:
    """The load stays as it was in the last window."""
    return with_upper_bound(window.mean_C, window, quantile=quantile)


class PopularityForecaster:
    """Each function keeps its share of all tokens so far, older ones counting less.

    Args:
        half_life_s: after which a token counts half.
    """

    def __init__(self, num_cells: int, *, half_life_s: float) -> None:
        if not half_life_s > 0:
            raise ConfigError(f"forecast.half_life_s must be above 0, got {half_life_s}")
        self._half_life_s = half_life_s
        self._decayed_C = np.zeros(num_cells)
        self._seen_C = np.zeros(num_cells)
        self._seen_s = 0.0

    def mean_C(self, now_s: float, history: LoadHistory, window: WindowLoad) -> FloatArray:
        """Forecast tokens per step: as many as in the last window, by popularity. Times must not fall."""
        self._decayed_C *= 0.5 ** ((now_s - self._seen_s) / self._half_life_s)
        self._decayed_C += history.total_C - self._seen_C
        self._seen_s, self._seen_C = now_s, history.total_C.copy()
        total = self._decayed_C.sum()
        return self._decayed_C * (window.mean_C.sum() / total) if total > 0 else np.zeros_like(self._decayed_C)

    def forecast(self, now_s: float, history: LoadHistory, window: WindowLoad, *, quantile: float) -> Forecast:
        """The mean with its upper bound."""
        return with_upper_bound(self.mean_C(now_s, history, window), window, quantile=quantile)
