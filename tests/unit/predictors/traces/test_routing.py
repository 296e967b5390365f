"""Routing traces: their rules, told with row, layer and choice; sequences stay whole."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_predictors.traces import (
    DECODE,
    PREFILL,
    RoutingTrace,
    TraceFormatError,
    TraceMetadata,
    concat,
    synthetic_trace,
)
from moeless_predictors.traces.container import write_container

METADATA = TraceMetadata(model="m", num_experts=4, top_k=2, num_layers=2)


def arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of `from_arrays` for 5 tokens in sequences of 3 and 2."""
    return {
        "experts_TLk": np.tile(np.array([[0, 1], [3, 2]]), (5, 1, 1)),
        "weights_TLk": np.full((5, 2, 2), 0.5),
        "sequence_lengths_S": [3, 2],
    } | changes


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, Any]:
    array = np.array(arrays()[name])
    array[index] = value
    return {name: array}


def assert_equal(one: RoutingTrace, other: RoutingTrace) -> None:
    assert one.metadata == other.metadata
    assert one.labels == other.labels
    ours, theirs = one._columns(), other._columns()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_what_is_not_given_has_its_default() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays())
    assert trace.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert trace.phase_T.tolist() == [DECODE] * 5
    assert trace.sequence_of_T.tolist() == [0, 0, 0, 1, 1]
    assert trace.sequence_starts_S1.tolist() == [0, 3, 5]
    assert (trace.token_ids_T, trace.steps_T, trace.labels, trace.hidden_layers) == (None, None, None, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("experts_TLk", (3, 1, 0), 4), "'experts', row 3, layer 1, choice 0: must be from 0 to 3, got 4"),
        (changed("experts_TLk", (3, 1, 0), -1), "'experts', row 3, layer 1, choice 0: must be from 0 to 3, got -1"),
        (changed("experts_TLk", (4, 1, 0), 2), "'experts', row 4, layer 1: the experts of a token must differ"),
        (changed("weights_TLk", (2, 0, 1), np.nan), "'weights', row 2, layer 0, choice 1: must be from 0 .* got nan"),
        (changed("weights_TLk", (2, 0, 1), -0.1), "'weights', row 2, layer 0, choice 1: must be from 0 .* got -0.1"),
        (changed("weights_TLk", (2, 0, 1), 1e5), "'weights', row 2, layer 0, choice 1: must be from 0 to 65504"),
        ({"sequence_lengths_S": [3, 3]}, "lengths of the 2 sequences must add up to the 5 tokens, got 6"),
        ({"sequence_lengths_S": [5, 0]}, "sequence 1: must have at least one token"),
        ({"sequence_lengths_S": [6, -1]}, "sequence 1: must have at least one token"),
        ({"sequence_lengths_S": np.array([], int)}, "must have at least one sequence"),
        ({"sequence_lengths_S": [2.0, 3.0]}, "'sequence_lengths' must be an array of whole numbers, got float64"),
        ({"positions_T": [0, 2, 1, 0, 1]}, "'positions', row 2: must be above 2, .* got 1"),
        ({"positions_T": [0, 1, 2, 3, 3]}, "'positions', row 4: must be above 3"),
        ({"positions_T": [-1, 1, 2, 3, 4]}, "'positions', row 0: must be from 0"),
        ({"positions_T": [0, 1, 2, 3]}, r"'positions' must have the shape \[5\], got \[4\]"),
        ({"phase_T": [0, 1, 2, 0, 0]}, "'phase', row 2: must be from 0 to 1, got 2"),
        ({"token_ids_T": [0, 1, 2, 0, -3]}, "'token_ids', row 4: must be from 0 to 2147483647, got -3"),
        ({"token_ids_T": [0, 1, 2, 2**31, 0]}, "'token_ids', row 3"),
        ({"steps_T": [0, 1, -2, 0, 0]}, "'steps', row 2"),
        ({"experts_TLk": np.zeros((5, 3, 2), int)}, r"'experts' must have the shape \[5, 2, 2\], got \[5, 3, 2\]"),
        ({"weights_TLk": np.zeros((5, 2, 2), int)}, "'weights' must be an array of floating-point numbers, got int64"),
        ({"labels": ["a"]}, "labels must be 2, one a sequence, got 1"),
        ({"hidden": {2: np.zeros((5, 3))}}, "layers must be from 0 to 1, got 2"),
        ({"hidden": {0: np.zeros((5, 3)), 1: np.zeros((5, 4))}}, r"'hidden.1' must have the shape \[5, 3\]"),
        ({"hidden": {1: np.array([[0.0]] * 4 + [[np.inf]])}}, "'hidden.1', row 4: must be finite, got inf"),
    ],
)
def test_a_broken_rule_is_told_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceFormatError, match=message):
        RoutingTrace.from_arrays(METADATA, **arrays(**change))


@pytest.mark.parametrize("change", [{"num_experts": 0}, {"top_k": 5}, {"num_layers": 0}, {"num_experts": 1 << 17}])
def test_metadata_out_of_range_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(TraceFormatError, match=f"{next(iter(change))} must be a whole number"):
        replace(METADATA, **change)


def test_a_fault_in_a_file_whose_checksums_are_right_is_told_with_its_place(tmp_path: Path) -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays())
    experts = np.array(trace.experts_TLk)
    experts[1, 0] = 9
    path = tmp_path / "t"
    replace(trace, experts_TLk=experts).save(path)
    with pytest.raises(TraceFormatError, match=r"/t: column 'experts', row 1, layer 0, choice 0: .* got 9"):
        RoutingTrace.open(path)


def test_a_fault_beyond_the_first_block_of_rows_is_told_with_its_row() -> None:
    num_tokens = (1 << 18) + 10
    experts = np.tile(np.array([[0, 1], [3, 2]], np.uint8), (num_tokens, 1, 1))
    experts[-3, 1] = 3
    with pytest.raises(TraceFormatError, match=f"row {num_tokens - 3}, layer 1"):
        RoutingTrace.from_arrays(
            METADATA,
            experts_TLk=experts,
            weights_TLk=np.ones(experts.shape, np.float16),
            sequence_lengths_S=[num_tokens],
        )


@settings(max_examples=40, deadline=None)
@given(
    num_sequences=st.integers(1, 4),
    num_tokens=st.integers(1, 4),
    num_experts=st.sampled_from([1, 3, 256, 257]),
    hidden_size=st.sampled_from([None, 2]),
    with_labels=st.booleans(),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_what_is_saved_is_what_is_opened(
    tmp_path_factory: pytest.TempPathFactory,
    num_sequences: int,
    num_tokens: int,
    num_experts: int,
    hidden_size: int | None,
    with_labels: bool,
    dtype: type[np.floating[Any]],
) -> None:
    trace = synthetic_trace(
        num_sequences=num_sequences,
        tokens_per_sequence=num_tokens,
        num_experts=num_experts,
        top_k=min(2, num_experts),
        hidden_size=hidden_size,
    )
    trace = replace(
        trace,
        labels=tuple(f"λ{i}" * i for i in range(num_sequences)) if with_labels else None,
        hidden={layer: states.astype(dtype) for layer, states in trace.hidden.items()},
    )
    path = tmp_path_factory.getbasetemp() / "round.trace"
    trace.save(path)
    assert_equal(RoutingTrace.open(path), trace)
    assert_equal(RoutingTrace.open(path, verify=False), trace)
    assert trace.experts_TLk.dtype == (np.uint8 if num_experts <= 256 else np.uint16)


def test_previous_is_the_row_of_the_position_before_in_the_same_sequence() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays(positions_T=[4, 5, 7, 8, 9]))
    assert trace.previous_T.tolist() == [-1, 0, -1, -1, 3]


def test_sequences_are_taken_whole_and_in_the_order_asked_for() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays(token_ids_T=[1, 2, 3, 4, 5], labels=["a", "b"]))
    taken = trace.take_sequences([1, 0, 1])
    assert taken.token_ids_T is not None
    assert taken.token_ids_T.tolist() == [4, 5, 1, 2, 3, 4, 5]
    assert taken.sequence_starts_S1.tolist() == [0, 2, 5, 7]
    assert taken.labels == ("b", "a", "b")
    assert_equal(trace.take_sequences([0, 1]), trace)


@pytest.mark.parametrize("indices", [[], [2], [-1], [[0]]])
def test_sequences_that_are_not_there_cannot_be_taken(indices: list[Any]) -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays())
    with pytest.raises(ValueError, match="indices"):
        trace.take_sequences(np.array(indices, dtype=int))


@settings(max_examples=50, deadline=None)
@given(num_sequences=st.integers(2, 20), test_share=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_a_split_puts_every_sequence_whole_into_one_part(num_sequences: int, test_share: float, seed: int) -> None:
    lengths = np.arange(1, num_sequences + 1)
    num_tokens = int(lengths.sum())
    trace = RoutingTrace.from_arrays(
        METADATA,
        experts_TLk=np.tile(np.array([[0, 1], [3, 2]]), (num_tokens, 1, 1)),
        weights_TLk=np.ones((num_tokens, 2, 2)),
        sequence_lengths_S=lengths,
        labels=[str(length) for length in lengths],
    )
    train, test = trace.split(test_share=test_share, seed=seed)
    assert train.labels is not None
    assert test.labels is not None
    assert sorted(map(int, train.labels + test.labels)) == lengths.tolist()
    for part in (train, test):
        assert part.labels is not None
        assert np.diff(part.sequence_starts_S1).tolist() == [int(label) for label in part.labels]
    again = trace.split(test_share=test_share, seed=seed)
    assert_equal(train, again[0])
    assert_equal(test, again[1])


def test_a_split_needs_two_sequences_and_a_share_between() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays())
    with pytest.raises(ValueError, match="test_share must be above 0 and below 1, got 1"):
        trace.split(test_share=1)
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        trace.take_sequences([0]).split()


def test_the_parts_of_a_trace_put_together_are_the_trace() -> None:
    trace = synthetic_trace(num_sequences=4, hidden_size=3, prompt_tokens=5)
    trace = replace(trace, labels=tuple("abcd"), steps_T=None)
    parts = [trace.take_sequences([0, 1]), trace.take_sequences([2]), trace.take_sequences([3])]
    assert_equal(concat(parts), trace)


def test_steps_of_traces_put_together_stay_apart() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays(steps_T=[0, 1, 2, 1, 2]))
    both = concat([trace, trace])
    assert both.steps_T is not None
    assert both.steps_T.tolist() == [0, 1, 2, 1, 2, 3, 4, 5, 4, 5]


def test_traces_that_do_not_fit_are_not_put_together() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays())
    other = replace(trace, metadata=replace(METADATA, num_experts=5))
    with pytest.raises(ValueError, match="the same num_experts, got 4 and 5"):
        concat([trace, other])
    with pytest.raises(ValueError, match="the same columns"):
        concat([trace, replace(trace, labels=("a", "b"))])
    with pytest.raises(ValueError, match="at least one trace"):
        concat([])


def test_phases_are_kept() -> None:
    trace = RoutingTrace.from_arrays(METADATA, **arrays(phase_T=[PREFILL, PREFILL, DECODE, PREFILL, DECODE]))
    assert trace.phase_T.tolist() == [0, 0, 1, 0, 1]


def written(path: Path, fields: dict[str, Any], **columns: Any) -> Path:
    """A file with right checksums whose columns are those of a good trace but for these; None leaves one out."""
    good = RoutingTrace.from_arrays(METADATA, **arrays())
    everything = {**good._columns(), **columns}
    present = {name: column for name, column in everything.items() if column is not None}
    write_container(path, kind="routing", fields=asdict(METADATA) | fields, columns=present)
    return path


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        ({}, {"colour": np.zeros(5, np.uint8)}, "unknown columns: colour"),
        ({}, {"labels": np.zeros(2, np.uint8)}, "unknown columns: labels"),
        ({}, {"phase": None}, "columns are missing: phase"),
        ({}, {"phase": np.zeros(5, np.int32)}, "'phase' must have the type uint8, got int32"),
        ({"num_experts": 300}, {}, "'experts' must have the type uint16, got uint8"),
        ({"top_k": "two"}, {}, "metadata: top_k must be a whole number from 1 to 4, got 'two'"),
        ({"model": 3}, {}, "metadata: model and source must be texts, got 3"),
        ({"num_layers": 3}, {}, r"'experts' must have the shape \[5, 3, 2\], got \[5, 2, 2\]"),
        ({}, {"sequence_starts": np.array([1, 5])}, "'sequence_starts' must begin with 0"),
        (
            {},
            {"labels": np.frombuffer(b"ab", np.uint8), "label_starts": np.array([0, 2])},
            "labels must be 2, one a sequence, got 1",
        ),
        (
            {},
            {"labels": np.frombuffer(b"\xff\xff", np.uint8), "label_starts": np.array([0, 1, 2])},
            "column 'labels' must be UTF-8",
        ),
        (
            {},
            {"labels": np.frombuffer(b"ab", np.uint8), "label_starts": np.array([0, 1, 3])},
            "'label_starts' must go from 0 to 2, got .0, 3.",
        ),
        (
            {},
            {"labels": np.frombuffer(b"ab", np.uint8), "label_starts": np.array([0, 1, 2], np.int32)},
            "labels must be UTF-8 bytes and int64 offsets",
        ),
    ],
)
def test_a_file_whose_columns_are_not_those_of_its_metadata_is_refused_even_unverified(
    tmp_path: Path, fields: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "odd", fields, **columns)
    for verify in (True, False):
        with pytest.raises(TraceFormatError, match=message) as caught:
            RoutingTrace.open(path, verify=verify)
        assert str(path) in str(caught.value)
