"""Statistics against closed forms, and what must not change them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as array_strategy

from moeless_predictors.traces import PREFILL, ArrivalTrace, RoutingTrace, TraceMetadata, synthetic_trace
from moeless_predictors.traces.statistics import (
    adjacent_overlap,
    arrival_statistics,
    expert_loads,
    gini,
    next_layer_dependency,
    routing_statistics,
)

LOADS = array_strategy(np.int64, st.integers(1, 40), elements=st.integers(0, 10**6))


def trace_of(experts_TLk: Any, *, num_experts: int, lengths: list[int] | None = None, **columns: Any) -> RoutingTrace:
    experts = np.asarray(experts_TLk)
    _, num_layers, top_k = experts.shape
    return RoutingTrace.from_arrays(
        TraceMetadata(model="m", num_experts=num_experts, top_k=top_k, num_layers=num_layers),
        experts_TLk=experts,
        weights_TLk=np.broadcast_to(np.linspace(1, 0.5, top_k), experts.shape),
        sequence_lengths_S=[len(experts)] if lengths is None else lengths,
        **columns,
    )


@given(load=st.integers(0, 10**6), num_experts=st.integers(1, 300))
def test_even_load_has_gini_0(load: int, num_experts: int) -> None:
    assert gini(np.full(num_experts, load)) == pytest.approx(0, abs=1e-12)


@given(num_loaded=st.integers(1, 20), num_idle=st.integers(0, 200), load=st.integers(1, 10**6))
def test_gini_is_the_share_of_idle_experts_if_the_others_are_even(num_loaded: int, num_idle: int, load: int) -> None:
    loads = np.array([load] * num_loaded + [0] * num_idle)
    assert gini(loads) == pytest.approx(num_idle / len(loads))


@given(loads=LOADS, factor=st.integers(1, 1000), seed=st.integers(0, 100))
def test_gini_depends_neither_on_scale_nor_on_order(loads: Any, factor: int, seed: int) -> None:
    value = gini(loads)
    assert 0 <= value + 1e-9 < 1 + 1e-9
    assert gini(np.random.default_rng(seed).permutation(loads) * factor) == pytest.approx(value)


@given(loads=LOADS.filter(lambda loads: loads.sum() > 0))
def test_gini_is_half_the_mean_difference_over_the_mean(loads: Any) -> None:
    loads = loads.astype(float)
    differences = np.abs(loads[:, np.newaxis] - loads[np.newaxis, :])
    assert gini(loads) == pytest.approx(differences.mean() / (2 * loads.mean()))


@settings(max_examples=25, deadline=None)
@given(
    num_sequences=st.integers(1, 6),
    num_tokens=st.integers(1, 12),
    num_experts=st.integers(2, 12),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_figures_stay_in_their_bounds_and_sequences_may_change_places(
    num_sequences: int, num_tokens: int, num_experts: int, top_k: int, seed: int
) -> None:
    trace = synthetic_trace(
        num_sequences=num_sequences,
        tokens_per_sequence=num_tokens,
        num_layers=3,
        num_experts=num_experts,
        top_k=top_k,
        seed=seed,
    )
    loads = expert_loads(trace)
    assert loads.sum(axis=1).tolist() == [trace.num_tokens * top_k] * 3
    statistics = routing_statistics(trace)
    for layer in statistics.layers:
        assert 1 <= layer.max_to_mean <= num_experts / top_k + 1e-9
        assert 0 <= layer.cv <= np.sqrt(num_experts)
        assert -1e-9 <= layer.gini <= 1 - top_k / num_experts + 1e-9
        assert layer.num_unused == (loads[layer.layer] == 0).sum()
        assert (layer.adjacent_overlap is None) == (num_tokens == 1)
        assert layer.adjacent_overlap is None or 0 <= layer.adjacent_overlap <= 1
        assert top_k / num_experts - 1e-9 <= layer.chance_overlap <= 1 + 1e-9
        assert (layer.next_layer_dependency is None) == (layer.layer == 2)
        assert layer.next_layer_dependency is None or layer.next_layer_dependency <= 1 + 1e-9
    turned = routing_statistics(trace.take_sequences(np.arange(num_sequences)[::-1]))
    for ours, theirs in zip(statistics.layers, turned.layers, strict=True):
        assert (ours.gini, ours.max_to_mean, ours.num_unused) == (theirs.gini, theirs.max_to_mean, theirs.num_unused)
        assert ours.adjacent_overlap == pytest.approx(theirs.adjacent_overlap)
        assert ours.next_layer_dependency == pytest.approx(theirs.next_layer_dependency)


def test_every_expert_equally_used_is_even_in_every_figure() -> None:
    experts = np.array([[[0, 1]], [[2, 3]]] * 4)
    layer = routing_statistics(trace_of(experts, num_experts=4)).layers[0]
    assert (layer.max_to_mean, layer.cv, layer.num_unused) == (1, 0, 0)
    assert layer.gini == pytest.approx(0)
    assert layer.adjacent_overlap == 0
    assert layer.chance_overlap == pytest.approx(0.5)


def test_a_repeated_choice_overlaps_fully_whatever_its_order() -> None:
    trace = trace_of([[[0, 1]], [[1, 0]], [[0, 1]]], num_experts=4)
    assert adjacent_overlap(trace) == pytest.approx([1.0])
    layer = routing_statistics(trace).layers[0]
    assert (layer.max_to_mean, layer.cv, layer.gini) == (2, 1, 0.5)


def test_overlap_counts_the_shared_experts_within_sequences_only() -> None:
    trace = trace_of([[[0, 1]], [[1, 2]], [[1, 2]], [[0, 3]]], num_experts=4, lengths=[2, 2])
    assert adjacent_overlap(trace) == pytest.approx([0.25])  # 1 of 2, then 0 of 2


def test_tokens_with_a_gap_between_them_are_not_adjacent() -> None:
    assert adjacent_overlap(trace_of([[[0]], [[0]]], num_experts=2, positions_T=[0, 2])) is None


def test_a_layer_that_determines_the_next_has_dependency_1() -> None:
    first = np.arange(200) % 8
    experts = np.stack([first, (first * 3 + 1) % 8], axis=1)[:, :, np.newaxis]
    assert next_layer_dependency(trace_of(experts, num_experts=8)) == pytest.approx([1.0])


@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_independent_layers_have_dependency_near_0_even_in_a_short_trace(num_tokens: int) -> None:
    values = []
    for seed in range(10):
        experts = np.random.default_rng(seed).integers(0, 32, (num_tokens, 2, 1))
        values.extend(next_layer_dependency(trace_of(experts, num_experts=32)))
    assert abs(np.mean(values)) < 0.02


def test_dependency_goes_by_the_choice_with_the_highest_weight() -> None:
    pairs = np.array(list(itertools.permutations(range(6), 2)) * 10)
    experts = np.stack([pairs, pairs[:, ::-1]], axis=1)
    weights = np.zeros(experts.shape)
    weights[:, 0, 0] = weights[:, 1, 1] = 1  # the first of the pair in both layers
    trace = RoutingTrace.from_arrays(
        TraceMetadata(model="m", num_experts=6, top_k=2, num_layers=2),
        experts_TLk=experts,
        weights_TLk=weights,
        sequence_lengths_S=[len(pairs)],
    )
    assert next_layer_dependency(trace) == pytest.approx([1.0])


def test_dependency_of_a_long_trace_is_that_of_a_part_of_it() -> None:
    trace = synthetic_trace(num_sequences=60, tokens_per_sequence=100, num_experts=8)
    np.testing.assert_allclose(
        next_layer_dependency(trace, max_tokens=2000), next_layer_dependency(trace, max_tokens=10_000), atol=0.05
    )


def test_prefill_tokens_are_counted() -> None:
    trace = trace_of([[[0]], [[1]], [[0]]], num_experts=2, phase_T=[PREFILL, PREFILL, 1])
    statistics = routing_statistics(trace)
    assert (statistics.num_tokens, statistics.num_prefill_tokens, statistics.num_sequences) == (3, 2, 1)


def test_requests_at_even_times_have_no_burstiness() -> None:
    trace = ArrivalTrace.from_arrays(
        arrival_s=np.arange(11) * 0.5,
        prompt_tokens=np.arange(11) * 10,
        output_tokens=[7] * 11,
        block_hashes=[[1, i + 100] for i in range(11)],
    )
    statistics = arrival_statistics(trace)
    assert (statistics.num_requests, statistics.duration_s, statistics.requests_per_s) == (11, 5, 2)
    assert statistics.gap_cv == pytest.approx(0)
    assert statistics.prompt_tokens == {5: 5, 50: 50, 95: 95, 99: 99}
    assert (statistics.num_prompt_tokens, statistics.num_output_tokens) == (550, 77)
    assert statistics.shared_block_share == pytest.approx(10 / 22)


def test_a_poisson_process_has_burstiness_1_and_bursts_have_more() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1.0, 20_000)
    zeros = np.zeros(20_000, int)
    poisson = ArrivalTrace.from_arrays(arrival_s=np.cumsum(gaps), prompt_tokens=zeros, output_tokens=zeros)
    assert arrival_statistics(poisson).gap_cv == pytest.approx(1, abs=0.05)
    bursts = np.where(rng.random(20_000) < 0.9, gaps / 100, gaps * 10)
    bursty = ArrivalTrace.from_arrays(arrival_s=np.cumsum(bursts), prompt_tokens=zeros, output_tokens=zeros)
    assert (arrival_statistics(bursty).gap_cv or 0) > 2


def test_requests_that_come_at_once_have_no_rate() -> None:
    trace = ArrivalTrace.from_arrays(arrival_s=[3.0, 3.0], prompt_tokens=[1, 1], output_tokens=[1, 1])
    statistics = arrival_statistics(trace)
    assert (statistics.requests_per_s, statistics.gap_cv, statistics.shared_block_share) == (None, None, None)
