"""Knowledge about routing before it is served: forecasts of fitted predictors, and earlier recordings.

Shapes: T tokens, L MoE layers, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.simulate.forecasts import PredictedRouting
from moeless.simulate.routing import SequenceRouting
from moeless_predictors.fitting import FitConfig, inputs_by_layer
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.traces import RoutingTrace
from moeless_predictors.traces.statistics import expert_loads


def popularity_LE(predictors: PredictorSet) -> FloatArray:
    """Mean tokens of each function for a token of the routing that predictors were fitted to, shape (L, E).

    Layers that nothing was fitted for, as the first, are taken to be even.
    """
    mean_LE = np.full((predictors.num_layers, predictors.num_experts), predictors.top_k / predictors.num_experts)
    for pair in predictors.pairs.values():
        counts_E = pair.popularity.counts_
        mean_LE[pair.target] = predictors.top_k * _smoothed(counts_E)
    return mean_LE


def recorded_LE(trace: RoutingTrace) -> FloatArray:
    """The same of a routing trace."""
    mean_LE: FloatArray = trace.top_k * _smoothed(expert_loads(trace))
    return mean_LE


def _smoothed(counts_E: IntArray | FloatArray) -> FloatArray:
    """Shares of the last axis, as if each expert had been chosen once more (Laplace): none is taken to be unused."""
    raised_E = np.asarray(counts_E, dtype=np.float64) + 1
    shares_E: FloatArray = raised_E / raised_E.sum(axis=-1, keepdims=True)
    return shares_E


def predicted_routing(
    predictors: PredictorSet, trace: RoutingTrace, *, on_progress: Callable[[int, int], None] | None = None
) -> PredictedRouting:
    """The k most probable experts of every token and layer, and what corrects loads for drift.

    Each layer is predicted from the nearest one that predictors were fitted for. Where there is none, as for the
    first, a token is expected to go where the one before it in its sequence went.

    Args:
        on_progress: called with the number of layers done and of all.
    Raises: ConfigError if the predictors are of another shape, or need hidden states that the trace does not have.
    """
    for name in ("num_layers", "num_experts", "top_k"):
        if getattr(predictors, name) != getattr(trace, name):
            raise ConfigError(
                f"predictors: {name} must be {getattr(trace, name)} as of the trace, got {getattr(predictors, name)}"
            )
    nearest = {
        target: min((pair for pair in predictors.pairs.values() if pair.target == target), key=lambda p: p.distance)
        for target in {pair.target for pair in predictors.pairs.values()}
    }
    unseen = {pair.layer for pair in nearest.values() if pair.kind == "gate"} - set(trace.hidden_layers)
    if unseen:
        raise ConfigError(
            f"predictors: the trace must have the hidden states of layers {', '.join(map(str, sorted(unseen)))}"
        )
    true_TLk = np.asarray(trace.experts_TLk)
    previous_T = np.where(trace.previous_T >= 0, trace.previous_T, np.arange(trace.num_tokens))
    told_TLk = true_TLk[previous_T]
    config = FitConfig(
        kinds=tuple({pair.kind for pair in nearest.values()}),
        distances=predictors.distances,
        features=predictors.features,
    )
    for inputs in inputs_by_layer(trace, config):
        for pair in nearest.values():
            if pair.layer == inputs.layer:
                told_TLk[:, pair.target] = pair.predictor.predict_topk(inputs.features(pair.kind, pair.target))
        if on_progress is not None:
            on_progress(inputs.layer + 1, trace.num_layers)
    hits = (true_TLk[..., :, np.newaxis] == told_TLk[..., np.newaxis, :]).any(axis=-1)
    told = RoutingTrace.from_arrays(
        trace.metadata,
        experts_TLk=told_TLk,
        weights_TLk=np.asarray(trace.weights_TLk),
        sequence_lengths_S=np.diff(trace.sequence_starts_S1),
    )
    return PredictedRouting(
        spans=SequenceRouting(told),
        recall=float(hits.mean()),
        drift_of={target: pair.quantile for target, pair in nearest.items()},
    )
