"""Coverage of the load's quantile on recorded traces of another kind than those it was fitted on.

Needs the folder of traces (MOELESS_DATA): the popularity and transition predictors and the calibration see one
data set of DeepSeek-V2-Lite, the bounds are tested on the other.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moeless_predictors.base import LoadPredictor, one_hot
from moeless_predictors.metrics import coverage
from moeless_predictors.popularity import PopularityPredictor
from moeless_predictors.quantile import LoadBatches, LoadQuantile, draw_batches
from moeless_predictors.traces import RoutingTrace, import_trace
from moeless_predictors.transition import TransitionPredictor

KINDS = ("intent", "law")
LAYERS = (2, 9, 16, 23)


@pytest.fixture(scope="module")
def traces() -> dict[str, RoutingTrace]:
    folder = os.environ.get("MOELESS_DATA")
    if not folder:
        pytest.skip("needs the folder of traces that MOELESS_DATA names")
    found = {}
    for kind in KINDS:
        path = Path(folder) / "routing" / f"deepseek-v2-lite-{kind}.npz"
        if not path.exists():
            pytest.skip(f"needs {path.name} in the folder that MOELESS_DATA names")
        trace = import_trace(path).trace
        assert isinstance(trace, RoutingTrace)
        found[kind] = trace
    return found


@pytest.mark.parametrize("predictor", [PopularityPredictor(), TransitionPredictor()], ids=["popularity", "transition"])
@pytest.mark.parametrize("fitted_on", KINDS)
@pytest.mark.parametrize(
    ("size", "is_contiguous"), [(1, False), (16, False), (64, False), (256, False), (16, True), (64, True)]
)
def test_coverage_is_within_three_points_on_the_other_kind_of_text(
    traces: dict[str, RoutingTrace], predictor: LoadPredictor, fitted_on: str, size: int, is_contiguous: bool
) -> None:
    other = next(kind for kind in KINDS if kind != fitted_on)
    train, calibration = traces[fitted_on].split(test_share=1 / 3)
    bounds, loads = [], []
    for layer in LAYERS:
        X_nS, y_nE = _next_layer(train, layer)
        predictor.fit(X_nS, y_nE)
        held_out = _batches(predictor, calibration, layer, sizes=(1, 4, 16, 64, 256), is_contiguous=False)
        quantile = LoadQuantile(0.9).fit(held_out)
        stream = _batches(predictor, traces[other], layer, sizes=(size,), is_contiguous=is_contiguous)
        for mean_E, variance_E, load_E, num_tokens in zip(
            stream.mean_BE, stream.variance_BE, stream.load_BE, stream.num_tokens_B.tolist(), strict=True
        ):
            bounds.append(quantile.upper(mean_E, variance_E, num_tokens))
            loads.append(load_E)
            quantile.update(mean_E, variance_E, load_E, num_tokens)
    assert coverage(np.array(bounds), np.array(loads)) == pytest.approx(0.9, abs=0.03)


def _next_layer(trace: RoutingTrace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    num_experts = trace.metadata.num_experts
    source_nS, target_nE = (
        one_hot(np.asarray(trace.experts_TLk[:, number]), num_experts) for number in (layer, layer + 1)
    )
    return source_nS, target_nE


def _batches(
    predictor: LoadPredictor, trace: RoutingTrace, layer: int, *, sizes: tuple[int, ...], is_contiguous: bool
) -> LoadBatches:
    X_nS, y_nE = _next_layer(trace, layer)
    count = min(200, trace.num_tokens // max(sizes)) if len(sizes) == 1 else 200
    starts_S1 = trace.sequence_starts_S1 if is_contiguous else None
    return draw_batches(
        predictor.predict_proba(X_nS), y_nE, sizes=sizes, batches_per_size=count, sequence_starts=starts_S1
    )
