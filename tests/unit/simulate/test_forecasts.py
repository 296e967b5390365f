from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moeless.core.arrays import FloatArray
from moeless.core.errors import ConfigError
from moeless.planning.load_history import LoadHistory
from moeless.simulate.forecasts import ForecastConfig, Forecaster, Future, PredictedRouting
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario
from moeless_predictors.quantile import LoadBatches, LoadQuantile


def unknown(horizon_s: float) -> tuple[FloatArray, int]:
    raise AssertionError(f"looked {horizon_s} s ahead at what nobody can know")


@pytest.fixture(name="routing")
def routing_fixture(make_scenario: Callable[..., Scenario]) -> SequenceRouting:
    """3 layers of 8 experts, top-2."""
    return make_scenario().routing


def drift_of(num_layers: int) -> dict[int, LoadQuantile]:
    batches = LoadBatches(
        mean_BE=np.full((20, 8), 4.0),
        variance_BE=np.full((20, 8), 3.0),
        load_BE=np.full((20, 8), 4.0),
        num_tokens_B=np.full(20, 16),
    )
    return {layer: LoadQuantile().fit(batches) for layer in range(num_layers)}


def counts(*tokens_E: int) -> FloatArray:
    return np.tile(np.array(tokens_E, dtype=np.float64), 3)


def predictor(routing: SequenceRouting, drift: dict[int, LoadQuantile]) -> Forecaster:
    predicted = PredictedRouting(spans=routing, recall=0.5, drift_of=drift)
    return Forecaster(ForecastConfig(kind="predictor"), routing, predicted)


def test_what_predictors_saw_of_running_requests_is_the_forecast(routing: SequenceRouting) -> None:
    history = LoadHistory(24, window_s=10)
    history.add(counts(8, 8, 0, 0, 0, 0, 0, 0).astype(np.int64), 0.5)
    future = Future(true=unknown, expected=lambda _: (counts(0, 0, 16, 16, 0, 0, 0, 0), 2))
    mean_LE, upper_LE = predictor(routing, {}).forecast(1.0, 1.0, history, history.window(1.0), future)
    assert mean_LE[0].tolist() == pytest.approx([0, 0, 8, 8, 0, 0, 0, 0])
    assert (upper_LE >= mean_LE).all()


def test_popularity_stands_in_for_requests_that_predictors_saw_nothing_of(routing: SequenceRouting) -> None:
    history = LoadHistory(24, window_s=10)
    history.add(counts(8, 8, 0, 0, 0, 0, 0, 0).astype(np.int64), 0.5)
    future = Future(true=unknown, expected=lambda _: (counts(0, 0, 4, 4, 0, 0, 0, 0), 1))
    mean_LE, _ = predictor(routing, {}).forecast(1.0, 1.0, history, history.window(1.0), future)
    assert mean_LE[1].tolist() == pytest.approx([4, 4, 4, 4, 0, 0, 0, 0])


def test_loads_that_predictors_get_wrong_are_corrected_for_drift(routing: SequenceRouting) -> None:
    drift = drift_of(2)  # nothing is known of the last layer
    forecaster, history = predictor(routing, drift), LoadHistory(24, window_s=10)
    future = Future(true=unknown, expected=lambda _: (counts(0, 0, 8, 8, 0, 0, 0, 0), 1))
    for tick in range(1, 80):
        history.add(counts(8, 8, 0, 0, 0, 0, 0, 0).astype(np.int64) * 50, tick - 0.5)
        mean_LE, _ = forecaster.forecast(float(tick), 1.0, history, history.window(float(tick)), future)
    share_LE = mean_LE / mean_LE.sum(axis=1, keepdims=True)
    assert share_LE[0, :2].sum() > 0.95
    assert share_LE[2, :2].sum() == pytest.approx(1 - 16 / 800)  # popularity alone
    assert mean_LE.sum(axis=1) == pytest.approx(np.full(3, 800))
    assert not drift[0].drift_.any(), "the predictors' own are not changed"


@pytest.mark.parametrize("kind", ["window", "popularity"])
def test_forecasts_from_the_past_look_at_nothing_else(kind: str, routing: SequenceRouting) -> None:
    history = LoadHistory(24, window_s=10)
    history.add(counts(1, 2, 3, 4, 0, 0, 0, 0).astype(np.int64), 0.5)
    forecaster = Forecaster(ForecastConfig(kind=kind), routing)  # type: ignore[arg-type]
    future = Future(true=unknown, expected=unknown)
    mean_LE, _ = forecaster.forecast(1.0, 1.0, history, history.window(1.0), future)
    assert mean_LE[0].tolist() == pytest.approx([1, 2, 3, 4, 0, 0, 0, 0])


def test_the_kind_predictor_needs_predictors(routing: SequenceRouting) -> None:
    with pytest.raises(ConfigError, match="forecast.kind predictor needs predictors, got none"):
        Forecaster(ForecastConfig(kind="predictor"), routing)
