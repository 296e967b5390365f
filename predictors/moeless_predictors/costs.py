"""Measure the cost of a prediction: microseconds a layer for a batch of decoded tokens, features included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.base import LoadPredictor
from moeless_predictors.features import FeatureConfig, choice_values
from moeless_predictors.live_features import LiveFeatures, StepRows

BATCH_SIZE = 32
"""Tokens in the batch that costs are measured for."""
_REPEATS = 15
_PAST_TOKENS = 64


class CostMeter:
    """Measures predictors of one model's shape. The time is that of the process, less what others took from it."""

    def __init__(self, config: FeatureConfig, *, num_layers: int, num_experts: int, top_k: int) -> None:
        self._shape = (num_layers, num_experts, top_k)
        self._config = config
        self._live: LiveFeatures | None = None
        self._random = np.random.default_rng(0)

    def microseconds(self, kind: str, predictor: LoadPredictor, layer: int) -> float:
        """Time to predict the probabilities of BATCH_SIZE tokens from source layer `layer`."""
        if kind == "popularity":
            features_nF = np.zeros((1, predictor.n_features_in_), dtype=np.float32)  # one row stands for all
            return _median_us(partial(predictor.fast_proba, features_nF))
        if kind != "history":
            features_nF = self._random.random((BATCH_SIZE, predictor.n_features_in_)).astype(np.float32)
            return _median_us(partial(predictor.fast_proba, features_nF))
        return self._history_us(predictor, layer)

    def _history_us(self, predictor: LoadPredictor, layer: int) -> float:
        """With a synthetic past for each sequence: the cost depends only on its length."""
        num_layers, _, _ = self._shape
        live = self._live = self._live or self._with_past()
        experts_nk, weights_nk = self._choices()

        def once() -> float:
            live.begin_step(_rows(_PAST_TOKENS))
            for seen in range(layer):
                live.observe(seen, experts_nk, weights_nk)
            started = time.thread_time_ns()
            live.observe(layer, experts_nk, weights_nk)
            predictor.fast_proba(live.features(layer, min(layer + 1, num_layers - 1)))
            return (time.thread_time_ns() - started) / 1e3

        return statistics.median(once() for _ in range(_REPEATS))

    def _with_past(self) -> LiveFeatures:
        num_layers, num_experts, top_k = self._shape
        live = LiveFeatures(
            self._config, num_layers=num_layers, num_experts=num_experts, top_k=top_k, num_slots=BATCH_SIZE
        )
        for position in range(_PAST_TOKENS):
            live.begin_step(_rows(position))
            for layer in range(num_layers):
                live.observe(layer, *self._choices())
            live.end_step()
        return live

    def _choices(self) -> tuple[IntArray, FloatArray]:
        _, num_experts, top_k = self._shape
        experts_nk = np.argsort(self._random.random((BATCH_SIZE, num_experts)), axis=1)[:, :top_k]
        return experts_nk, choice_values(self._random.random((BATCH_SIZE, top_k)))


def _rows(position: int) -> list[StepRows]:
    return [StepRows(str(number), 1, position) for number in range(BATCH_SIZE)]


def _median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - started) / 1e3)
    return statistics.median(times)
