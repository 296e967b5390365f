from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.simulate.routing import SequenceRouting, assign_sequences
from moeless_predictors.traces import RoutingTrace, TraceMetadata

LENGTHS = (50, 7, 83)


def make() -> SequenceRouting:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((sum(LENGTHS), 3, 5)), axis=2)[:, :, :2]
    return SequenceRouting(
        RoutingTrace.from_arrays(
            TraceMetadata(model="m", num_experts=5, top_k=2, num_layers=3),
            experts_TLk=experts,
            weights_TLk=np.full(experts.shape, 0.5),
            sequence_lengths_S=LENGTHS,
        )
    )


ROUTING = make()


def counted_one_by_one(sequence: int, first: int, num_tokens: int) -> list[int]:
    counts = np.zeros((3, 5), dtype=int)
    for position in range(first, first + num_tokens):
        row = ROUTING.starts_S1[sequence] + position % LENGTHS[sequence]
        for layer in range(3):
            counts[layer, ROUTING.trace.experts_TLk[row, layer]] += 1
    return counts.reshape(-1).tolist()


@given(st.integers(0, 2), st.integers(0, 400), st.integers(1, 400))
def test_a_span_counts_what_its_tokens_do_however_often_it_wraps(sequence: int, first: int, num_tokens: int) -> None:
    assert ROUTING.of_span(sequence, first, num_tokens).tolist() == counted_one_by_one(sequence, first, num_tokens)


@given(st.integers(0, 2), st.integers(0, 200), st.integers(1, 200), st.integers(1, 200))
def test_two_spans_count_what_the_whole_does(sequence: int, first: int, some: int, more: int) -> None:
    parts = ROUTING.of_span(sequence, first, some) + ROUTING.of_span(sequence, first + some, more)
    assert (parts == ROUTING.of_span(sequence, first, some + more)).all()


def test_single_tokens_are_counted_by_sequence_and_position() -> None:
    counts = ROUTING.of_tokens(np.array([0, 2]), np.array([51, 3]))
    assert counts.tolist() == (np.array(counted_one_by_one(0, 1, 1)) + counted_one_by_one(2, 3, 1)).tolist()


def test_every_layer_gets_k_times_the_tokens() -> None:
    assert ROUTING.of_span(2, 5, 300).reshape(3, 5).sum(axis=1).tolist() == [600] * 3


def test_sequences_in_order_are_followed_from_the_first_to_the_last() -> None:
    assert assign_sequences(6, 3, in_order=True, seed=0).tolist() == [0, 0, 1, 1, 2, 2]


def test_drawn_sequences_depend_on_the_seed_alone() -> None:
    drawn = assign_sequences(100, 7, in_order=False, seed=1)
    assert (drawn == assign_sequences(100, 7, in_order=False, seed=1)).all()
    assert set(drawn.tolist()) == set(range(7))
    assert (drawn != assign_sequences(100, 7, in_order=False, seed=2)).any()


def test_a_trace_too_large_for_fine_blocks_is_counted_in_coarse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.simulate.routing._PREFIX_BYTES", 100)
    coarse = SequenceRouting(ROUTING.trace)
    assert coarse._block > ROUTING._block
    assert (coarse.of_span(0, 3, 400) == ROUTING.of_span(0, 3, 400)).all()
