from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from moeless_predictors import base, live_loops
from moeless_predictors.arrays import FloatArray
from moeless_predictors.features import FeatureConfig
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.live import LiveConfig, LivePredictor
from moeless_predictors.live_features import LiveFeatures, StepRows
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.traces import RoutingTrace
from moeless_predictors.traces.synthetic import synthetic_trace
from moeless_predictors.transition import TransitionPredictor


def no_hidden() -> None:
    raise AssertionError("no gate was asked for")


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synthetic_trace(num_sequences=40, tokens_per_sequence=40, num_layers=4, num_experts=12, top_k=2, seed=5)


@pytest.fixture(scope="module")
def predictors(trace: RoutingTrace) -> PredictorSet:
    return fit_predictors(trace, FitConfig(kinds=("transition",), distances=(1,), batch_sizes=(1, 16, 32)))


def decode(live: LivePredictor, trace: RoutingTrace, *, steps: int, sequences: int = 16, forget: bool = True) -> None:
    """The trace's sequences side by side, over and over."""
    starts, num_positions = trace.sequence_starts_S1, 40
    for step in range(steps):
        position = step % num_positions
        rows = starts[:sequences] + position
        names = [f"{step // num_positions}.{sequence}" for sequence in range(sequences)]
        live.begin_step([StepRows(name, 1, position) for name in names])
        for layer in range(trace.num_layers):
            live.observe(layer, trace.experts_TLk[rows, layer], trace.weights_TLk[rows, layer], no_hidden)
        live.end_step()
        if forget and position == num_positions - 1:
            for name in names:
                live.forget(name)


def test_forecasts_sum_to_the_choices_of_the_batch(trace: RoutingTrace, predictors: PredictorSet) -> None:
    live = LivePredictor(predictors, LiveConfig(max_share=1.0, measure_every=3))
    rows = np.arange(20)
    for step in range(7):
        live.begin_step([StepRows("prompt", 20, 20 * step, True)])
        for layer in range(4):
            forecast = live.observe(layer, trace.experts_TLk[rows, layer], trace.weights_TLk[rows, layer], no_hidden)
            if layer == 3:
                assert forecast is None
                continue
            assert forecast is not None
            assert forecast.layer == layer + 1
            assert forecast.load_E.sum() == pytest.approx(40, rel=0.1)  # the correction for drift is cut at 0 and 20
            if step % 3:
                assert forecast.upper_E is None
            else:
                assert forecast.upper_E is not None
                assert (forecast.upper_E >= 0).all()
                assert (forecast.upper_E <= 20).all()
        live.end_step()


def test_accuracy_is_measured_and_beats_popularity(trace: RoutingTrace, predictors: PredictorSet) -> None:
    live = LivePredictor(predictors, LiveConfig(max_share=1.0, measure_every=2, window=32))
    decode(live, trace, steps=160)
    rows = live.accuracy()
    assert [row.layer for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.is_active
        assert row.load_error < row.popularity_error
        assert 0.3 < row.recall <= 1
        assert 0.75 < row.coverage <= 1
        assert 1 < row.bound_width < row.popularity_bound_width
        assert row.num_forecasts == 160
    latest = live.latest(2)
    assert latest is not None
    assert latest.upper_E is not None
    assert live.latest(0) is None


def test_a_predictor_worse_than_popularity_is_switched_off_and_tried_again(
    trace: RoutingTrace, predictors: PredictorSet, caplog: pytest.LogCaptureFixture
) -> None:
    turned = {key: replace(pair) for key, pair in predictors.pairs.items()}
    wrong = predictors.pairs[1, 1]
    # Experts renamed: its forecasts are those of other experts.
    matrix_SE = wrong.predictor._matrix_SE[:, ::-1].copy()  # type: ignore[attr-defined]
    lying = fit_predictors(trace, FitConfig(kinds=("transition",), distances=(1,), batch_sizes=(16,))).pairs[1, 1]
    lying.predictor._matrix_SE = matrix_SE  # type: ignore[attr-defined]
    turned[1, 1] = lying
    # The bound's drift would mend the mean over time; here it learns nothing.
    lying.quantile.set_params(drift_half_life_tokens=None)
    live = LivePredictor(
        replace(predictors, pairs=turned), LiveConfig(max_share=1.0, measure_every=1, window=16, retry_after=2)
    )
    with caplog.at_level(logging.INFO, logger="moeless_predictors.layer_forecaster"):
        decode(live, trace, steps=16)
        assert [row.is_active for row in live.accuracy()] == [True, False, True]
        assert "predictor switched off layer=2 distance=1 kind=transition" in caplog.text
        live.begin_step([StepRows("x", 1, 0)])
        for layer in range(2):
            forecast = live.observe(layer, trace.experts_TLk[:1, layer], trace.weights_TLk[:1, layer], no_hidden)
        assert forecast is not None
        assert forecast.kind == "popularity"
        live.end_step()
        decode(live, trace, steps=32)
        assert "predictor tried again layer=2" in caplog.text


def other_subject() -> RoutingTrace:
    return synthetic_trace(num_sequences=40, tokens_per_sequence=40, num_layers=4, num_experts=12, top_k=2, seed=6)


def errors_of_layer_2(live: LivePredictor, trace: RoutingTrace, *, steps: int) -> list[float]:
    """Relative L1 error of every step's forecast, 16 sequences side by side."""
    errors = []
    for step in range(steps):
        rows = trace.sequence_starts_S1[:16] + step % 40
        live.begin_step([StepRows(f"{step // 40}.{sequence}", 1, step % 40) for sequence in range(16)])
        forecasts = [
            live.observe(layer, trace.experts_TLk[rows, layer], trace.weights_TLk[rows, layer], no_hidden)
            for layer in range(4)
        ]
        live.end_step()
        forecast = forecasts[1]
        assert forecast is not None
        load_E = np.bincount(trace.experts_TLk[rows, 2].ravel(), minlength=12)
        errors.append(float(np.abs(forecast.load_E - load_E).sum() / load_E.sum()))
    return errors


def test_popularity_and_drift_follow_a_change_of_subject_in_steps_that_are_not_measured(
    predictors: PredictorSet,
) -> None:
    other = other_subject()
    config = LiveConfig(max_share=1.0, measure_every=1000, popularity_half_life_tokens=128)
    learning = LivePredictor(predictors, config)
    static = LivePredictor(predictors, config)
    for quantile in static._layers[1]._quantiles.values():
        quantile.set_params(drift_half_life_tokens=None)
    with_drift, without = (errors_of_layer_2(live, other, steps=80)[-40:] for live in (learning, static))
    assert np.mean(with_drift) < 0.9 * np.mean(without)
    popularity_E = learning._layers[1]._popularity.load(16)
    true_E = np.bincount(other.experts_TLk[:, 2].ravel(), minlength=12) * (32 / other.experts_TLk[:, 2].size)
    assert np.abs(popularity_E - true_E).sum() / 32 < 0.3


def test_what_is_not_finite_in_one_token_leaves_the_forecast_of_the_others(
    trace: RoutingTrace, predictors: PredictorSet
) -> None:
    live = LivePredictor(predictors, LiveConfig(max_share=1.0, measure_every=2))
    weights_TLk = np.array(trace.weights_TLk[:20], dtype=np.float32)
    weights_TLk[3] = np.nan
    for step in range(4):
        live.begin_step([StepRows("prompt", 20, 20 * step, True)])
        for layer in range(4):
            forecast = live.observe(layer, trace.experts_TLk[:20, layer], weights_TLk[:, layer], no_hidden)
            if forecast is not None:
                assert np.isfinite(forecast.load_E).all()
                assert forecast.load_E.sum() == pytest.approx(40, rel=0.1)
        live.end_step()
    assert all(np.isfinite(row.load_error) for row in live.accuracy())


def test_experts_long_unused_leave_no_subnormal_features() -> None:
    features = LiveFeatures(FeatureConfig(window=4), num_layers=2, num_experts=8, top_k=2)
    smallest_normal = np.finfo(np.float32).tiny
    weights_nk = np.ones((1, 2), dtype=np.float32)
    for position in range(2200):
        features.begin_step([StepRows("long", 1, position)])
        experts_nk = np.array([[6, 7]] if position == 0 else [[0, 1]])
        features.observe(0, experts_nk, weights_nk)
        features_nF = features.features(0, 1)
        assert not ((features_nF > 0) & (features_nF < smallest_normal)).any(), position
        features.observe(1, experts_nk, weights_nk)
        features.end_step()


def test_a_step_that_is_broken_off_leaves_nothing_behind(trace: RoutingTrace, predictors: PredictorSet) -> None:
    live = LivePredictor(predictors, LiveConfig(max_share=1.0, measure_every=1))
    live.begin_step([StepRows("a", 4, 0, True)])
    live.observe(0, trace.experts_TLk[:4, 0], trace.weights_TLk[:4, 0], no_hidden)
    live.begin_step([StepRows("b", 6, 0, True)])
    for layer in range(4):
        live.observe(layer, trace.experts_TLk[:6, layer], trace.weights_TLk[:6, layer], no_hidden)
    live.end_step()
    assert [row.num_forecasts for row in live.accuracy()] == [2, 1, 1]


@pytest.mark.parametrize("max_share", [0.004, 0.02, 0.05, 1.0])
def test_forecasting_keeps_to_its_share_of_the_steps_time(
    trace: RoutingTrace, predictors: PredictorSet, max_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = spent_s = 0.0
    fast_proba = TransitionPredictor.fast_proba

    def slow_proba(self: TransitionPredictor, X_nF: FloatArray) -> FloatArray:
        nonlocal now_s, spent_s
        now_s += 0.003
        spent_s += 0.003
        return fast_proba(self, X_nF)

    monkeypatch.setattr(TransitionPredictor, "fast_proba", slow_proba)
    live = LivePredictor(predictors, LiveConfig(max_share=max_share), clock=lambda: now_s)
    spent_s = 0.0  # making it ready does not count
    followed = []
    num_steps = 2000
    for step in range(num_steps):
        rows = trace.sequence_starts_S1[:4] + step % 40
        live.begin_step([StepRows(str(sequence), 1, step) for sequence in range(4)])
        forecasts = []
        for layer in range(trace.num_layers):
            now_s += 0.02  # the model's own work
            choices = trace.experts_TLk[rows, layer], trace.weights_TLk[rows, layer]
            forecasts.append(live.observe(layer, *choices, no_hidden))
        live.end_step()
        followed.append(forecasts[0] is not None)
        assert all((forecast is not None) == followed[-1] for forecast in forecasts[:-1])
    assert followed[0]
    assert spent_s <= max_share * now_s + 0.009
    # No more steps are left out than that takes: one costs 9 ms and brings in the share of some 89.
    assert sum(followed) >= min(num_steps, 0.95 * num_steps * max_share * 0.08 / 0.009)
    assert [row.num_forecasts for row in live.accuracy()] == [sum(followed)] * 3


@pytest.mark.parametrize("max_share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(max_share: float) -> None:
    with pytest.raises(ValueError, match="max_share must be above 0 and at most 1, got"):
        LiveConfig(max_share=max_share)


@pytest.mark.parametrize("name", ["distance", "measure_every", "window", "retry_after"])
def test_a_setting_out_of_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LiveConfig(**{name: 0})


def test_nothing_is_left_to_compile_when_the_first_step_comes(trace: RoutingTrace) -> None:
    fitted = fit_predictors(
        trace, FitConfig(kinds=("history",), distances=(1,), history={"epochs": 1, "min_steps": 1}, batch_sizes=(1, 16))
    )
    live = LivePredictor(fitted, LiveConfig(max_share=1.0, measure_every=1))
    kernels = (
        live_loops.note_choices,
        live_loops.compare_with_past,
        live_loops.fill_above,
        live_loops.fill_past,
        live_loops.append_tokens,
        base.num_found,
    )
    compiled = [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]
    decode(live, trace, steps=3)
    assert all(count > 0 for count in compiled)
    assert [len(kernel.signatures) for kernel in kernels] == compiled  # type: ignore[attr-defined]
