from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeless_predictors.evaluation import FROZEN, SELECTED, Evaluation, EvaluationConfig, evaluate, evaluate_set
from moeless_predictors.fitting import FitConfig, divide, fit_predictors
from moeless_predictors.traces import RoutingTrace, concat
from moeless_predictors.traces.synthetic import synthetic_trace

FAST = {"epochs": 60, "min_steps": 1, "hidden_units": 32, "batch_size": 64}


def trace_of(**changes: object) -> RoutingTrace:
    shape = {"num_sequences": 40, "tokens_per_sequence": 30, "num_layers": 4, "num_experts": 12, "top_k": 2, "seed": 2}
    return synthetic_trace(**{**shape, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return trace_of(hidden_size=16)


@pytest.fixture(scope="module")
def evaluation(trace: RoutingTrace) -> Evaluation:
    config = EvaluationConfig(
        fit=FitConfig(distances=(1, 2), history=FAST), batch_sizes=(1, 16, 64), batches_per_size=60
    )
    return evaluate(trace, config)


def test_every_kind_is_measured_for_every_layer_and_distance(evaluation: Evaluation) -> None:
    assert evaluation.kinds == ["popularity", FROZEN, "transition", "gate", "history", SELECTED]
    for kind in evaluation.kinds:
        assert [m.layer for m in evaluation.of(kind, 1)] == [0, 1, 2]
        assert [m.layer for m in evaluation.of(kind, 2)] == [0, 1]
    for measure in evaluation.measures:
        assert [batch.size for batch in measure.batches] == [1, 16, 64]
        assert measure.cost_us > 0
        for batch in measure.batches:
            assert 0 <= batch.relative_l1 <= 2
            assert batch.straggler_top_tenth_rounded_down <= batch.straggler_top_tenth


def test_where_layers_depend_on_one_another_knowing_more_is_better(evaluation: Evaluation) -> None:
    recall = {kind: evaluation.mean_recall(kind, 1) for kind in evaluation.kinds}
    assert recall["popularity"] + 0.1 < recall["transition"] < recall["gate"]
    assert recall["transition"] < recall["history"]
    assert evaluation.mean_of_batches("gate", 1, 64, "relative_l1") < evaluation.mean_of_batches(
        "popularity", 1, 64, "relative_l1"
    )


def test_the_selected_one_is_the_chosen_kind(evaluation: Evaluation) -> None:
    for selected in evaluation.of(SELECTED, 1):
        (chosen,) = [m for m in evaluation.of(selected.chosen, 1) if m.layer == selected.layer]
        assert (selected.recall, selected.batches) == (chosen.recall, chosen.batches)
        assert selected.reason.startswith(f"{selected.chosen}: ")


def test_coverage_is_near_its_nominal_value(evaluation: Evaluation) -> None:
    for kind in ("popularity", "transition", "gate"):
        assert evaluation.mean_of_batches(kind, 1, 16, "coverage") == pytest.approx(0.9, abs=0.03)


def test_the_width_of_the_bounds_stands_beside_their_coverage(evaluation: Evaluation) -> None:
    width = {kind: evaluation.mean_of_batches(kind, 1, 64, "bound_width") for kind in evaluation.kinds}
    assert 1 < width["gate"] < width["popularity"]
    assert width["transition"] < width["popularity"]


def test_popularity_follows_a_change_of_subject_and_frozen_popularity_does_not() -> None:
    first, second = trace_of(seed=2), trace_of(seed=77)
    subjects = concat([with_label(first, "first"), with_label(second, "second")])
    found = evaluate(
        subjects,
        EvaluationConfig(
            fit=FitConfig(kinds=("popularity",), distances=(1,)),
            split_by_label=True,
            test_share=0.5,
            batch_sizes=(16,),
        ),
    )
    assert found.num_test_tokens == first.num_tokens
    for better, name in ((1, "straggler_top_tenth"), (-1, "relative_l1")):
        online, frozen = (found.mean_of_batches(kind, 1, 16, name) for kind in ("popularity", FROZEN))
        assert better * online > better * frozen, name


def with_label(trace: RoutingTrace, label: str) -> RoutingTrace:
    return replace(trace, labels=(label,) * trace.num_sequences)


def test_no_sequence_is_learned_from_and_tested_on(trace: RoutingTrace) -> None:
    labelled = RoutingTrace.from_arrays(
        trace.metadata,
        experts_TLk=trace.experts_TLk,
        weights_TLk=trace.weights_TLk,
        sequence_lengths_S=np.diff(trace.sequence_starts_S1),
        labels=[f"sequence {number}" for number in range(trace.num_sequences)],
    )
    rest, test = labelled.split(test_share=0.2, seed=0)
    learning, held_out = divide(rest, FitConfig())
    parts = [set(part.labels or ()) for part in (learning, held_out, test)]
    assert [len(part) for part in parts] == [29, 3, 8]
    assert len(set.union(*parts)) == 40


def test_a_longer_trace_is_cut_to_whole_sequences(trace: RoutingTrace) -> None:
    learning, held_out = divide(trace, FitConfig(max_tokens=300))
    assert learning.num_tokens + held_out.num_tokens == 300
    assert learning.num_sequences + held_out.num_sequences == 10


def test_fitted_predictors_are_measured_on_another_trace(trace: RoutingTrace) -> None:
    predictors = fit_predictors(trace.take_sequences(range(35)), FitConfig(kinds=("transition",), distances=(1,)))
    other = evaluate_set(predictors, trace.take_sequences(range(35, 40)), _few())
    assert other.kinds == ["popularity", FROZEN, "transition", SELECTED]
    assert other.num_test_sequences == 5
    assert other.mean_recall(SELECTED, 1) > other.mean_recall("popularity", 1)


def test_a_trace_of_another_shape_is_refused(trace: RoutingTrace) -> None:
    predictors = fit_predictors(trace, FitConfig(kinds=("popularity",), distances=(1,)))
    with pytest.raises(ValueError, match="num_experts of the trace must be 12 as of the predictors, got 13"):
        evaluate_set(predictors, trace_of(num_experts=13), _few())


def test_a_gate_without_hidden_states_is_refused(trace: RoutingTrace) -> None:
    predictors = fit_predictors(trace, FitConfig(kinds=("gate",), distances=(1,)))
    with pytest.raises(ValueError, match="trace must have the hidden states of layers 0, 1, 2"):
        evaluate_set(predictors, trace_of(), _few())


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 sequences, got 2"):
        evaluate(trace_of(num_sequences=2), _few())
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        fit_predictors(trace_of(num_sequences=1), FitConfig())


def test_distances_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"distances must hold one .* the 4 layers, got \(4,\)"):
        evaluate(trace_of(), EvaluationConfig(fit=FitConfig(distances=(4,))))


def test_kinds_that_the_trace_does_not_allow_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds must hold one that layer 0 of the trace allows, got gate"):
        fit_predictors(trace_of(), FitConfig(kinds=("gate",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_share": 1.0}, "test_share must be between 0 and 1, got 1.0"),
        ({"batch_sizes": (0,)}, "batch_sizes must be at least 1"),
        ({"batches_per_size": 0}, "batches_per_size must be at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**changes)  # type: ignore[arg-type]


def _few() -> EvaluationConfig:
    return EvaluationConfig(batch_sizes=(1, 16), batches_per_size=10)
