from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_predictors.fitting import FitConfig, fit_predictors, inputs_by_layer
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.storage import PredictorFormatError, write_arrays
from moeless_predictors.traces import RoutingTrace
from moeless_predictors.traces.synthetic import synthetic_trace

KINDS = ("popularity", "transition", "gate", "history")


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synthetic_trace(
        num_sequences=12, tokens_per_sequence=20, num_layers=3, num_experts=8, top_k=2, hidden_size=8, seed=1
    )


def fitted(trace: RoutingTrace, kind: str) -> PredictorSet:
    config = FitConfig(kinds=(kind,), distances=(1, 2), history={"epochs": 1, "min_steps": 1}, batch_sizes=(1, 8))
    return fit_predictors(trace, config)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_predicts_what_was_saved(kind: str, trace: RoutingTrace, tmp_path: Path) -> None:
    saved = fitted(trace, kind)
    saved.save(tmp_path / "set")
    loaded = PredictorSet.load(tmp_path / "set")
    assert loaded.distances == (1, 2)
    assert (loaded.model, loaded.features) == (saved.model, saved.features)
    config = FitConfig(kinds=(kind,), features=saved.features)
    for inputs in inputs_by_layer(trace, config):
        for distance in (1, 2):
            if (inputs.layer, distance) not in saved.pairs:
                continue
            ours, theirs = saved.pairs[inputs.layer, distance], loaded.pairs[inputs.layer, distance]
            features_TF = inputs.features(kind, ours.target)
            assert (ours.choice, ours.candidates) == (theirs.choice, theirs.candidates)
            assert (ours.predictor.predict_proba(features_TF) == theirs.predictor.predict_proba(features_TF)).all()
            assert (ours.popularity.counts_ == theirs.popularity.counts_).all()
            mean_E = np.full(8, 4.0)
            assert (ours.quantile.upper(mean_E, mean_E / 2, 16) == theirs.quantile.upper(mean_E, mean_E / 2, 16)).all()


def test_loads_sum_to_the_choices_of_all_tokens(trace: RoutingTrace) -> None:
    for kind in KINDS:
        predictors = fitted(trace, kind)
        for inputs in inputs_by_layer(trace, FitConfig(kinds=(kind,))):
            if (pair := predictors.pairs.get((inputs.layer, 1))) is not None:
                load_E = pair.predictor.predict_load(inputs.features(kind, pair.target))
                assert load_E.min() >= 0
                assert load_E.sum() == pytest.approx(2 * trace.num_tokens, rel=1e-3)


@pytest.mark.parametrize("kind", ["popularity", "transition"])
def test_the_order_of_sequences_does_not_matter(kind: str, trace: RoutingTrace) -> None:
    turned = trace.take_sequences(range(trace.num_sequences - 1, -1, -1))
    # Both learn from all sequences, so that the division into parts plays no role.
    for ours, theirs in zip(_learned(trace, kind), _learned(turned, kind), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def _learned(trace: RoutingTrace, kind: str) -> list[np.ndarray]:
    from moeless_predictors.fitting import fit_kinds

    config = FitConfig(kinds=(kind,))
    found = []
    for inputs in inputs_by_layer(trace, config):
        if inputs.layer + 1 < trace.num_layers:
            predictor = fit_kinds(trace, inputs, inputs.layer + 1, config)[kind]
            found.append(predictor.predict_proba(np.eye(8, dtype=np.float32)))
    return found


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(cut: float, tmp_path_factory: pytest.TempPathFactory, trace: RoutingTrace) -> None:
    folder = tmp_path_factory.mktemp("cut")
    fitted(trace, "popularity").save(folder / "set")
    whole = (folder / "set").read_bytes()
    (folder / "set").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(PredictorFormatError):
        PredictorSet.load(folder / "set")


def test_what_is_missing_or_foreign_is_named(trace: RoutingTrace, tmp_path: Path) -> None:
    write_arrays(tmp_path / "empty", {}, {"version": 2}, kind="moeless-predictor-set")
    with pytest.raises(PredictorFormatError, match="'pairs' is missing"):
        PredictorSet.load(tmp_path / "empty")
    write_arrays(tmp_path / "old", {}, {"version": 1}, kind="moeless-predictor-set")
    with pytest.raises(PredictorFormatError, match="version must be 2, got 1: fit the predictors again"):
        PredictorSet.load(tmp_path / "old")
    trace.save(tmp_path / "trace")
    with pytest.raises(PredictorFormatError, match="format must be 'moeless-predictor-set'"):
        PredictorSet.load(tmp_path / "trace")


def test_predictors_of_another_shape_do_not_make_a_set(trace: RoutingTrace) -> None:
    predictors = fitted(trace, "popularity")
    with pytest.raises(ValueError, match=r"experts and top-k must be \(9, 2\), got \(8, 2\)"):
        replace(predictors, num_experts=9)
    with pytest.raises(ValueError, match="target layer must be below 2, got 2"):
        replace(predictors, num_layers=2)
    with pytest.raises(ValueError, match="pairs must hold at least one predictor"):
        replace(predictors, pairs={})
