"""Predictions in a real engine: they change no token, and are those that the same routing gives offline."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from moeless.core.arrays import Float32Array, Int64Array
from moeless.core.errors import ConfigError
from moeless.core.recording import RecordingOptions
from moeless.engine.observing import rows_in
from moeless.engine.prediction import PredictionObserver, live_predictor
from moeless.engine.routing_recorder import RoutingRecorder
from moeless_predictors.fitting import FitConfig, fit_predictors, inputs_by_layer
from moeless_predictors.live import LiveConfig, LivePredictor
from moeless_predictors.predictor_set import KINDS, PredictorSet
from moeless_predictors.traces import RoutingTrace
from tests.unit.engine.routed import PAGED, STATIC, Family, LoadFamily, dispatched
from tests.unit.engine.support import Recorder, prompt_of, request

PROMPTS = {str(length): prompt_of(length) for length in (1, 7, 30, 65)}
FAST = {"epochs": 2, "min_steps": 1}


def generate(family: Family, *observers: Any, max_tokens: int = 24) -> dict[str, list[int]]:
    deltas = Recorder()
    with dispatched(family, deltas) as served:
        for observer in observers:
            served.observers.add(observer)
        for name, prompt in PROMPTS.items():
            served.submit(request(name, prompt, max_tokens=max_tokens))
        answers = deltas.wait_for(*PROMPTS)
    return {name: answer.token_ids for name, answer in zip(PROMPTS, answers, strict=True)}


def record(family: Family) -> RoutingTrace:
    deltas = Recorder()
    with dispatched(family, deltas) as served:
        layers = tuple(range(family.metadata.num_layers))
        recorder = RoutingRecorder(
            served.observers, family.metadata, RecordingOptions(max_tokens=4000, hidden_layers=layers)
        )
        recorder.start()
        for name, prompt in PROMPTS.items():
            served.submit(request(name, prompt, max_tokens=24))
        deltas.wait_for(*PROMPTS)
    return recorder.take_trace()


def fitted(trace: RoutingTrace, kind: str) -> PredictorSet:
    config = FitConfig(kinds=(kind,), distances=(1,), history=FAST, batch_sizes=(1, 4, 16))
    return fit_predictors(trace, config)


@pytest.mark.parametrize("name", [PAGED, STATIC])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_with_a_predictor_as_without(name: str, kind: str, load_family: LoadFamily) -> None:
    family = load_family(name)
    live = LivePredictor(fitted(record(family), kind), LiveConfig(max_share=1.0, measure_every=2))
    expected = generate(family)
    assert generate(family, PredictionObserver(live)) == expected
    assert len(expected["7"]) == 24
    for accuracy in live.accuracy():
        assert accuracy.kind == kind
        assert accuracy.num_forecasts > 20
        assert 0 < accuracy.recall <= 1
        assert accuracy.seconds > 0


class _Forecasts(PredictionObserver):
    """Keeps the load forecast of each step, with the step's only sequence and position."""

    def __init__(self, live: LivePredictor) -> None:
        super().__init__(live)
        self.loads: dict[tuple[int, int], Float32Array] = {}

    def begin_step(self, spans: list[Any]) -> None:
        super().begin_step(spans)
        self._position = spans[0].first_position if len(spans) == 1 and spans[0].num_rows == 1 else -1
        self._step_rows = rows_in(spans)

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array) -> None:
        rows = self._step_rows
        forecast = self.live.observe(layer, experts_Tk[rows], weights_Tk[rows], lambda: hidden_TH[rows])
        if forecast is not None and self._position >= 0:
            self.loads[layer, self._position] = forecast.load_E


def test_live_forecasts_are_those_of_the_recorded_trace(load_family: LoadFamily) -> None:
    family = load_family(PAGED)
    config = FitConfig(kinds=("history",), distances=(1,), history=FAST, batch_sizes=(1,))
    predictors = fit_predictors(record(family), config)
    deltas = Recorder()
    with dispatched(family, deltas) as served:
        recorder = RoutingRecorder(served.observers, family.metadata, RecordingOptions(max_tokens=4000))
        for pair in predictors.pairs.values():
            pair.quantile.set_params(drift_half_life_tokens=None)  # forecasts are not corrected for drift
        forecasts = _Forecasts(LivePredictor(predictors, LiveConfig(max_share=1.0, measure_every=10_000)))
        served.observers.add(forecasts)
        recorder.start()
        served.submit(request("one", prompt_of(9), max_tokens=30))
        deltas.wait_for("one")
    trace = recorder.take_trace()
    compared = 0
    for inputs in inputs_by_layer(trace, config):
        if (pair := predictors.pairs.get((inputs.layer, 1))) is None:
            continue
        offline_TE = pair.predictor.predict_proba(inputs.features("history", pair.target))
        for row, position in enumerate(trace.positions_T.tolist()):
            if (inputs.layer, position) in forecasts.loads:
                # Weights are recorded in half precision.
                np.testing.assert_allclose(forecasts.loads[inputs.layer, position], offline_TE[row], atol=5e-3)
                compared += 1
    assert compared >= 29 * (family.metadata.num_layers - 1)


def test_a_predictor_that_raises_is_taken_out_and_generation_goes_on(
    load_family: LoadFamily, caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(PAGED)
    predictors = fitted(record(family), "transition")
    expected = generate(family)
    live = LivePredictor(predictors)
    for pair in predictors.pairs.values():
        pair.predictor._matrix_SE = np.ones((1, 1))  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        assert generate(family, PredictionObserver(live)) == expected
    assert "observer taken out observer=PredictionObserver" in caplog.text


def test_predictors_of_another_model_are_refused(load_family: LoadFamily) -> None:
    family = load_family(PAGED)
    predictors = fitted(record(family), "popularity")

    class Other:
        num_moe_layers, num_experts, top_k = predictors.num_layers, predictors.num_experts + 1, predictors.top_k

    with pytest.raises(ConfigError, match=rf"with experts {Other.num_experts}, got {predictors.num_experts}"):
        live_predictor(predictors, LiveConfig(), Other)  # type: ignore[arg-type]


def test_a_distance_that_was_not_fitted_is_refused(load_family: LoadFamily) -> None:
    predictors = fitted(record(load_family(PAGED)), "popularity")
    with pytest.raises(ValueError, match="distance must be one that the predictors were fitted for .1., got 3"):
        LivePredictor(predictors, LiveConfig(distance=3))
