"""Forecasts in a running server: at each MoE layer, the load that the batch will put on the layer `distance` ahead.

Called by the engine's observer, layer by layer. Popularity learns online, with decay, in every step that is followed.
Some of these steps are measured as well: they give the running accuracy, calibrate the bounds online, and decide
whether the predictor still beats popularity. One that does not is switched off for its layer, and popularity's
forecast takes its place.

Forecasting is limited to a share of the steps' time: after a step that is followed, the next one is followed once that
time is earned back. From the steps between only the routing is kept, so that features are the same as if every step
were followed.

Shapes: n tokens of a step, E experts, k experts per token, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.base import one_hot
from moeless_predictors.features import choice_values
from moeless_predictors.layer_forecaster import LayerAccuracy, LayerForecaster, LiveConfig, LoadForecast
from moeless_predictors.live_features import LiveFeatures, StepRows
from moeless_predictors.predictor_set import PredictorSet

__all__ = ["LayerAccuracy", "LayerForecaster", "LiveConfig", "LivePredictor", "LoadForecast"]


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
            layer: LayerForecaster(pair, config)
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
        """Take in the routing of `layer`; layers come in order.

        Args:
            hidden: returns the hidden states at its experts' input, shape (n, H), as a torch tensor; called for gates.
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
        """Accuracy of every layer that is predicted, in order."""
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
                    forecaster = LayerForecaster(pair, self._config)
                    probabilities_nE = None if kind == "popularity" else pair.predictor.fast_proba(X_nF)
                    forecaster.forecast(probabilities_nE, 1, is_measured=True, is_prefill=False)
                    forecaster.settle(experts_nk, is_prefill=False)
            features.end_step()

    def _probabilities(
        self, forecaster: LayerForecaster, experts_nk: IntArray, weights_nk: FloatArray, hidden: Callable[[], Any]
    ) -> FloatArray | None:
        """Probabilities by the pair's predictor, shape (n, E); None where popularity forecasts."""
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
