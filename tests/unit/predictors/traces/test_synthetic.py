"""The made-up traces have the structure that their arguments ask for."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace, synthetic_trace
from moeless_predictors.traces.statistics import adjacent_overlap, expert_loads, gini, next_layer_dependency


def mean_gini(trace: RoutingTrace) -> float:
    return float(np.mean([gini(load_E) for load_E in expert_loads(trace)]))


def mean_overlap(trace: RoutingTrace) -> float:
    overlap_L = adjacent_overlap(trace)
    assert overlap_L is not None
    return float(overlap_L.mean())


def test_the_seed_decides() -> None:
    one, same, other = (synthetic_trace(num_sequences=2, hidden_size=4, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.experts_TLk, same.experts_TLk)
    np.testing.assert_array_equal(one.hidden[3], same.hidden[3])
    assert (one.experts_TLk != other.experts_TLk).any()


def test_more_skew_is_less_even() -> None:
    even, some, much = (mean_gini(synthetic_trace(skew=skew)) for skew in (0.0, 0.5, 2.0))
    assert even + 0.1 < some < much - 0.1


def test_neighbours_resemble_each_other_as_asked() -> None:
    none, much = (synthetic_trace(skew=0, token_dependence=value) for value in (0.0, 0.95))
    assert mean_overlap(none) < 0.3
    assert mean_overlap(much) > mean_overlap(none) + 0.2


def test_layers_tell_about_the_next_as_asked() -> None:
    none, much = (synthetic_trace(layer_dependence=value) for value in (0.0, 0.99))
    assert np.mean(next_layer_dependency(none)) < 0.05
    assert np.mean(next_layer_dependency(much)) > 0.15


def test_drift_turns_the_load_from_the_first_to_the_last_sequences() -> None:
    def distance(drift: float) -> float:
        trace = synthetic_trace(num_sequences=64, drift=drift, skew=1.0)
        first, last = (expert_loads(trace.take_sequences(part)) for part in (np.arange(16), np.arange(48, 64)))
        return float(np.abs(first / first.sum() - last / last.sum()).sum())

    assert distance(1.0) > 2 * distance(0.0)


def test_prompts_are_prefilled_in_one_step_and_share_it() -> None:
    trace = synthetic_trace(num_sequences=2, tokens_per_sequence=5, prompt_tokens=3)
    assert trace.phase_T.tolist() == [PREFILL, PREFILL, PREFILL, DECODE, DECODE] * 2
    assert trace.steps_T is not None
    assert trace.steps_T.tolist() == [0, 0, 0, 1, 2] * 2


def test_hidden_states_are_there_when_asked_for() -> None:
    assert synthetic_trace(num_sequences=1).hidden_layers == ()
    trace = synthetic_trace(num_sequences=1, num_layers=3, hidden_size=5)
    assert trace.hidden_layers == (0, 1, 2)
    assert trace.hidden[2].shape == (64, 5)


def test_a_dependence_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="token_dependence must be from 0 to 1, got 1.5"):
        synthetic_trace(token_dependence=1.5)
