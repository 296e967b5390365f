from __future__ import annotations

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.simulate.forecasts import PredictedRouting
from moeless.simulate.offline_forecast import popularity_LE, predicted_routing, recorded_LE
from moeless.simulate.routing import SequenceRouting
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.traces import RoutingTrace, TraceMetadata, synthetic_trace


def followed_trace(num_sequences: int, seed: int, *, num_experts: int = 8) -> RoutingTrace:
    """Each layer's experts are the last one's, one further: the first layer tells all."""
    rng = np.random.default_rng(seed)
    first_T = rng.integers(num_experts, size=20 * num_sequences)
    experts = (first_T[:, np.newaxis, np.newaxis] + np.arange(4)[:, np.newaxis] + np.array([0, 2])) % num_experts
    return RoutingTrace.from_arrays(
        TraceMetadata(model="followed", num_experts=num_experts, top_k=2, num_layers=4),
        experts_TLk=experts,
        weights_TLk=np.full(experts.shape, 0.5),
        sequence_lengths_S=np.full(num_sequences, 20),
    )


def routing_of(found: PredictedRouting) -> SequenceRouting:
    assert isinstance(found.spans, SequenceRouting)
    return found.spans


@pytest.fixture(name="predictors", scope="module")
def predictors_fixture() -> PredictorSet:
    return fit_predictors(followed_trace(20, 1), FitConfig(kinds=("transition",), distances=(1, 2)))


def test_layers_that_follow_from_the_last_are_foretold_exactly(predictors: PredictorSet) -> None:
    trace = followed_trace(3, 2)
    found = predicted_routing(predictors, trace)
    told = routing_of(found)
    true = np.asarray(trace.experts_TLk)
    assert (np.sort(told.trace.experts_TLk[:, 1:], axis=2) == np.sort(true[:, 1:], axis=2)).all()
    first = [len(set(a) & set(b)) / 2 for a, b in zip(told.trace.experts_TLk[:, 0], true[:, 0], strict=True)]
    assert found.recall == pytest.approx((np.mean(first) + 3) / 4)


def test_the_first_layer_is_expected_as_of_the_token_before(predictors: PredictorSet) -> None:
    trace = followed_trace(2, 3)
    told = routing_of(predicted_routing(predictors, trace))
    true = np.asarray(trace.experts_TLk)
    assert (told.trace.experts_TLk[1:20, 0] == true[:19, 0]).all()
    assert (told.trace.experts_TLk[21:, 0] == true[20:39, 0]).all()


def test_what_is_foretold_of_a_part_of_a_request_counts_as_many_tokens(predictors: PredictorSet) -> None:
    told = predicted_routing(predictors, followed_trace(2, 4))
    assert told.spans.of_span(1, 5, 10).reshape(4, 8).sum(axis=1).tolist() == [20, 20, 20, 20]


def test_what_was_recorded_tells_the_mean_tokens_of_each_function() -> None:
    trace = followed_trace(5, 1)
    mean_LE = recorded_LE(trace)
    counts_LE = np.stack([np.bincount(trace.experts_TLk[:, layer].ravel(), minlength=8) for layer in range(4)])
    assert mean_LE == pytest.approx((counts_LE + 1) * 2 / (2 * trace.num_tokens + 8))
    assert (mean_LE > 0).all()


def test_predictors_know_how_often_each_expert_was_chosen_where_they_were_fitted(predictors: PredictorSet) -> None:
    mean_LE = popularity_LE(predictors)
    assert mean_LE.sum(axis=1) == pytest.approx(np.full(4, 2.0))
    assert mean_LE[0].tolist() == [0.25] * 8  # nothing is fitted for the first layer
    counts_E = predictors.pairs[0, 1].popularity.counts_
    assert mean_LE[1] == pytest.approx(2 * (counts_E + 1) / (counts_E.sum() + 8))
    assert mean_LE[1].std() > 0


def test_progress_ends_with_all_layers(predictors: PredictorSet) -> None:
    calls: list[tuple[int, int]] = []
    predicted_routing(predictors, followed_trace(2, 4), on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)


def test_predictors_of_another_model_are_refused(predictors: PredictorSet) -> None:
    trace = synthetic_trace(num_sequences=2, tokens_per_sequence=5, num_layers=3, num_experts=8, top_k=2)
    with pytest.raises(ConfigError, match="predictors: num_layers must be 3 as of the trace, got 4"):
        predicted_routing(predictors, trace)


def test_every_layer_that_is_predicted_has_its_correction_for_drift(predictors: PredictorSet) -> None:
    found = predicted_routing(predictors, followed_trace(2, 4))
    assert sorted(found.drift_of) == [1, 2, 3]
    assert found.drift_of[2] is predictors.pairs[1, 1].quantile  # of the nearest layer
