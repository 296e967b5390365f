"""Predicts load while the model runs: the observer between the engine's steps and moeless_predictors.live.

It reads the gates' choices and changes nothing: the dispatcher calls it once a layer's work has been sent to the
workers, so that its own work overlaps the layer.

Shapes: T rows of a step, n of them with a sequence, H hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moeless.core.arrays import Float32Array, Int64Array
from moeless.core.errors import ConfigError
from moeless.core.generation import PredictionStatus
from moeless.engine.observing import RowSpan, rows_in
from moeless.packages.manifest import Manifest
from moeless_predictors.live import LiveConfig, LivePredictor
from moeless_predictors.live_features import StepRows
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.storage import PredictorFormatError


class PredictionObserver:
    """A StepObserver that forecasts each layer's load while an earlier one runs."""

    def __init__(self, live: LivePredictor) -> None:
        self.live = live
        self._rows: slice | Int64Array = slice(0)

    def begin_step(self, spans: list[RowSpan]) -> None:
        self._rows = rows_in(spans)
        self.live.begin_step(
            [
                StepRows(
                    span.sequence.request_id,
                    span.num_rows,
                    span.first_position,
                    span.first_position < span.sequence.num_prompt_tokens,
                )
                for span in spans
            ]
        )

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array) -> None:
        rows = self._rows
        self.live.observe(layer, experts_Tk[rows], weights_Tk[rows], partial(_on_host, hidden_TH, rows))

    def end_step(self) -> None:
        self.live.end_step()

    def forget(self, request_id: str) -> None:
        self.live.forget(request_id)

    def status(self) -> list[PredictionStatus]:
        """Return the status of every layer's predictor. May be called from any thread."""
        return [
            PredictionStatus(
                layer=row.layer,
                distance=row.distance,
                kind=row.kind,
                reason=row.reason,
                active=row.is_active,
                recall=row.recall,
                load_error=row.load_error,
                popularity_error=row.popularity_error,
                coverage=row.coverage,
                bound_width=row.bound_width,
                popularity_bound_width=row.popularity_bound_width,
                forecasts=row.num_forecasts,
                seconds=row.seconds,
            )
            for row in self.live.accuracy()
        ]


def load_live_predictor(path: str, config: LiveConfig, manifest: Manifest) -> LivePredictor:
    """Raises ConfigError where the file holds no predictors, or none of this model or for this distance."""
    try:
        return live_predictor(PredictorSet.load(path), config, manifest)
    except (OSError, PredictorFormatError) as error:
        raise ConfigError(f"predictors: {error}") from error


def live_predictor(predictors: PredictorSet, config: LiveConfig, manifest: Manifest) -> LivePredictor:
    """Raises ConfigError where the predictors are not of this model or not for this distance."""
    for name, found, expected in (
        ("layers", predictors.num_layers, manifest.num_moe_layers),
        ("experts", predictors.num_experts, manifest.num_experts),
        ("top-k", predictors.top_k, manifest.top_k),
    ):
        if found != expected:
            raise ConfigError(
                f"predictors must be fitted for a model with {name} {expected}, got {found} ({predictors.model})"
            )
    try:
        return LivePredictor(predictors, config)
    except ValueError as error:
        raise ConfigError(f"predictors: {error}") from error


def _on_host(hidden_TH: Tensor, rows: slice | Int64Array) -> Tensor:
    if not isinstance(rows, slice):
        return hidden_TH.index_select(0, torch.from_numpy(rows).to(hidden_TH.device)).cpu()
    return hidden_TH[rows].cpu()
