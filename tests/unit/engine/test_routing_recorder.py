"""Rows that a recorder keeps, against the routing of transformers' own model, and rows made up to be hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.recording import RecordingOptions
from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.routing_recorder import RoutingRecorder, row_bytes
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.hooks import kv_bytes_per_token
from moeless.engine.transformers.sequence import Sequence
from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace, TraceMetadata
from tests.families import make_tokenizer
from tests.unit.engine.routed import PAGED, STATIC, Family, LoadFamily, dispatched, reference_routing
from tests.unit.engine.support import Answer, Recorder, prompt_of, request

LENGTHS = (1, 7, 30, 65, 150)
TEXTS = TokenTexts(make_tokenizer())
SMALL = TraceMetadata(model="m", num_experts=300, top_k=2, num_layers=3, hidden_size=4)


def options(**changes: Any) -> RecordingOptions:
    return RecordingOptions(**({"max_tokens": 2000, "token_ids": True} | changes))


def record(
    family: Family, recorded: RecordingOptions, prompts: dict[str, list[int]], max_tokens: int = 12, **engine: Any
) -> tuple[RoutingTrace, dict[str, list[int]]]:
    """Generate for all prompts together. Returns the trace and each sequence's tokens, as far as they were computed."""
    deltas = Recorder()
    with dispatched(family, deltas, **engine) as served:
        recorder = RoutingRecorder(served.observers, family.metadata, recorded)
        recorder.start()
        for name, prompt in prompts.items():
            served.submit(request(name, prompt, max_tokens=max_tokens))
        answers: list[Answer] = deltas.wait_for(*prompts)
    tokens = {name: [*prompt, *a.token_ids][:-1] for (name, prompt), a in zip(prompts.items(), answers, strict=True)}
    return recorder.take_trace(), tokens


def sequences(trace: RoutingTrace) -> list[slice]:
    return [slice(a, b) for a, b in zip(trace.sequence_starts_S1[:-1], trace.sequence_starts_S1[1:], strict=True)]


def assert_rows_are_the_models(family: Family, trace: RoutingTrace, rows: slice, token_ids: list[int]) -> None:
    expected = reference_routing(family.reference, token_ids)
    for row in range(rows.start, rows.stop):
        position = trace.positions_T[row]
        for layer, (experts, weights, hidden) in enumerate(expected[position]):
            order, order_r = np.argsort(trace.experts_TLk[row, layer]), np.argsort(experts)
            assert trace.experts_TLk[row, layer][order].tolist() == experts[order_r].tolist()
            assert np.allclose(trace.weights_TLk[row, layer][order], weights[order_r], atol=2e-3)
            if layer in trace.hidden:
                assert np.allclose(trace.hidden[layer][row], hidden, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("name", [PAGED, STATIC])
def test_a_batch_becomes_a_trace_of_whole_sequences(name: str, load_family: LoadFamily) -> None:
    family = load_family(name)
    prompts = {str(length): prompt_of(length) for length in LENGTHS}
    trace, tokens = record(family, options(hidden_layers=(1,)), prompts)
    assert trace.num_sequences == len(LENGTHS)
    assert trace.hidden_layers == (1,)
    assert trace.token_ids_T is not None
    by_tokens = {tuple(trace.token_ids_T[rows].tolist()): rows for rows in sequences(trace)}
    for request_id, token_ids in tokens.items():
        rows, length = by_tokens[tuple(token_ids)], int(request_id)
        assert trace.positions_T[rows].tolist() == list(range(len(token_ids)))
        assert trace.phase_T[rows].tolist() == [PREFILL] * length + [DECODE] * 11
        assert_rows_are_the_models(family, trace, rows, token_ids)


def test_steps_tell_which_tokens_were_computed_together(load_family: LoadFamily) -> None:
    trace, _ = record(load_family(PAGED), options(), {"a": prompt_of(100), "b": prompt_of(5)}, max_batch_tokens=64)
    assert trace.steps_T is not None
    counts = np.bincount(trace.steps_T)
    assert counts.max() == 64
    assert len(trace.steps_T) == 100 + 5 + 2 * 11
    for rows in sequences(trace):
        assert (np.diff(trace.steps_T[rows]) >= 0).all()
        decoding = trace.steps_T[rows][trace.phase_T[rows] == DECODE]
        assert (np.diff(decoding) > 0).all()


def test_token_ids_are_recorded_only_if_asked_for(load_family: LoadFamily) -> None:
    trace, _ = record(load_family(PAGED), options(token_ids=False), {"a": prompt_of(5)})
    assert trace.token_ids_T is None
    assert trace.num_tokens == 16


def test_positions_in_shared_pages_are_missing_and_the_rest_is_a_sequence(load_family: LoadFamily) -> None:
    family, prompt, deltas = load_family(PAGED), prompt_of(40), Recorder()
    with dispatched(family, deltas, page_size=16) as served:
        recorder = RoutingRecorder(served.observers, family.metadata, options())
        recorder.start()
        for name in ("first", "second"):
            served.submit(request(name, prompt, max_tokens=3))
            deltas.wait_for(name)
    trace = recorder.take_trace()
    assert [trace.positions_T[rows].tolist() for rows in sequences(trace)] == [list(range(42)), list(range(32, 42))]
    assert trace.previous_T[42] == -1


def test_a_sequence_that_had_to_make_room_is_kept_once(load_family: LoadFamily) -> None:
    family = load_family(PAGED)
    prompts = {str(n): prompt_of(20, seed=n) for n in range(5)}
    pool = 128 * kv_bytes_per_token(family.backbone)
    small = {"kv_cache_bytes": pool, "page_size": 4, "prefix_sharing": False}
    trace, tokens = record(family, options(), prompts, max_tokens=80, **small)
    assert trace.num_tokens == 5 * 99
    assert trace.token_ids_T is not None
    for rows, token_ids in zip(sequences(trace), tokens.values(), strict=True):
        assert trace.token_ids_T[rows].tolist() == token_ids
        assert_rows_are_the_models(family, trace, rows, token_ids)


def test_a_full_recorder_stops_at_a_whole_step_and_keeps_what_it_has(load_family: LoadFamily) -> None:
    family, deltas = load_family(PAGED), Recorder()
    with dispatched(family, deltas) as served:
        recorder = RoutingRecorder(served.observers, family.metadata, options(max_tokens=9))
        recorder.start()
        served.submit(request("a", prompt_of(5), max_tokens=20))
        deltas.wait_for("a")
        assert recorder.is_full
        served.submit(request("b", prompt_of(2), max_tokens=2))
        deltas.wait_for("b")
    trace = recorder.take_trace()
    assert trace.positions_T.tolist() == list(range(9))
    assert recorder.num_tokens == 9


def test_recording_may_begin_and_end_in_the_middle_of_a_sequence(load_family: LoadFamily) -> None:
    family, deltas = load_family(PAGED), Recorder()
    with dispatched(family, deltas) as served:
        recorder = RoutingRecorder(served.observers, family.metadata, options())
        served.submit(request("a", prompt_of(5), max_tokens=200))
        deltas.wait_for_tokens("a", 3)
        recorder.start()
        deltas.wait_for_tokens("a", 20)
        recorder.stop()
        (answer,) = deltas.wait_for("a")
    trace = recorder.take_trace()
    assert trace.num_sequences == 1
    assert trace.positions_T[0] > 5
    assert trace.num_tokens < 200
    assert (trace.phase_T == DECODE).all()
    assert_rows_are_the_models(family, trace, slice(0, trace.num_tokens), [*prompt_of(5), *answer.token_ids])


# -- steps made up -----------------------------------------------------------------------------------------------------


def unnamed(**changes: Any) -> RecordingOptions:
    """Without token ids, which sequences that nobody generates do not have."""
    return options(token_ids=False, **changes)


def sequence(request_id: str, num_prompt_tokens: int = 5) -> Sequence:
    return Sequence(request(request_id, list(range(10, 10 + num_prompt_tokens))), eos_ids=frozenset(), texts=TEXTS)


def routing_of(positions: np.ndarray, layer: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Routing that tells its position and layer."""
    experts = np.stack([positions % 300, (positions + 1 + layer) % 300], axis=1)
    weights = np.stack([positions / 512, np.full(len(positions), layer)], axis=1).astype(np.float32)
    return torch.full((len(positions), 4), float(layer)), experts, weights


def step(recorder: RoutingRecorder, spans: list[RowSpan], *, num_rows: int, num_layers: int = 3) -> None:
    """A whole step; rows in no span have positions that must not turn up."""
    positions = np.full(num_rows, 299)
    for span in spans:
        positions[span.first_row : span.first_row + span.num_rows] = span.first_position + np.arange(span.num_rows)
    recorder.begin_step(spans)
    for layer in range(num_layers):
        recorder.observe_layer(layer, *routing_of(positions, layer))
    recorder.end_step()


def test_padding_rows_are_nobodys() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed(hidden_layers=(2,)))
    a, b = sequence("a", 2), sequence("b", 4)
    step(recorder, [RowSpan(a, 2, 2, 0), RowSpan(b, 4, 4, 0)], num_rows=8)
    step(recorder, [RowSpan(a, 1, 1, 2), RowSpan(b, 3, 1, 4)], num_rows=4)
    trace = recorder.take_trace()
    assert trace.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert trace.experts_TLk[:, 1, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert trace.weights_TLk[:, 2, 1].tolist() == [2.0] * 8
    assert (trace.hidden[2] == 2).all()


def test_a_step_that_was_not_ended_leaves_no_rows() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed())
    a = sequence("a")
    recorder.begin_step([RowSpan(a, 0, 5, 0)])
    recorder.observe_layer(0, *routing_of(np.full(5, 9), 0))
    step(recorder, [RowSpan(a, 0, 5, 0)], num_rows=5)
    step(recorder, [RowSpan(a, 0, 1, 5)], num_rows=1, num_layers=2)
    trace = recorder.take_trace()
    assert trace.experts_TLk[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_name_that_is_used_again_is_another_sequence() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed())
    step(recorder, [RowSpan(sequence("a"), 0, 3, 0)], num_rows=3)
    recorder.forget("a")
    recorder.forget("never seen")
    step(recorder, [RowSpan(sequence("a"), 0, 3, 3)], num_rows=3)
    assert recorder.take_trace().sequence_starts_S1.tolist() == [0, 3, 6]


def test_hidden_states_too_large_for_float16_are_cut_to_its_range() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed(hidden_layers=(0,)))
    _, experts, weights = routing_of(np.zeros(1, dtype=np.int64), 0)
    recorder.begin_step([RowSpan(sequence("a"), 0, 1, 0)])
    for layer in range(3):
        hidden = torch.tensor([[1e9, -1e9, 0.5, 0.0]], dtype=torch.bfloat16)
        recorder.observe_layer(layer, hidden, experts, weights)
    recorder.end_step()
    assert recorder.take_trace().hidden[0].tolist() == [[65504.0, -65504.0, 0.5, 0.0]]


def test_a_layer_with_another_number_of_experts_ends_the_recording_with_the_reason() -> None:
    observers = StepObservers()
    recorder = RoutingRecorder(observers, SMALL, unnamed())
    recorder.start()
    with observers.step(lambda: [RowSpan(sequence("a"), 0, 1, 0)]):
        observers.observe_layer(0, torch.zeros(1, 4), np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), np.float32))
    assert recorder.error == "layer 0 has 1 experts per token, others 2"
    with observers.step(lambda: pytest.fail("still watching")):
        assert not observers.is_watching


def test_taking_an_empty_recording_is_refused() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed())
    with pytest.raises(ValueError, match="at least one token"):
        recorder.take_trace()


def test_a_step_under_way_while_the_trace_is_taken_harms_nobody() -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed())
    a = sequence("a")
    step(recorder, [RowSpan(a, 0, 3, 0)], num_rows=3)
    recorder.begin_step([RowSpan(a, 0, 1, 3)])
    recorder.observe_layer(0, *routing_of(np.array([3]), 0))
    assert recorder.take_trace().num_tokens == 3
    for layer in (1, 2):
        recorder.observe_layer(layer, *routing_of(np.array([3]), layer))
    recorder.end_step()
    recorder.begin_step([RowSpan(a, 0, 1, 4)])
    recorder.observe_layer(0, *routing_of(np.array([4]), 0))


def test_row_bytes_are_what_the_arrays_take() -> None:
    asked = options(hidden_layers=(0, 2))
    recorder = RoutingRecorder(StepObservers(), SMALL, asked)
    columns = recorder._columns
    assert columns is not None
    arrays = [a for a in vars(columns).values() if isinstance(a, np.ndarray)] + list(columns.hidden.values())
    assert sum(a.nbytes for a in arrays) == row_bytes(SMALL, asked) * asked.max_tokens


chunks = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=12
)  # (sequence, first position, rows) of one step each


@settings(deadline=None, max_examples=60)
@given(steps=chunks)
def test_in_every_order_of_computing_each_position_comes_once_behind_its_neighbour(
    steps: list[tuple[int, int, int]],
) -> None:
    recorder = RoutingRecorder(StepObservers(), SMALL, unnamed())
    found = [sequence(str(n), 6) for n in range(3)]
    for number, first, count in steps:
        step(recorder, [RowSpan(found[number], 0, count, first)], num_rows=count)
    computed = {(number, first + i) for number, first, count in steps for i in range(count)}
    trace = recorder.take_trace()
    assert trace.num_tokens == len(computed)
    assert trace.experts_TLk[:, 0, 0].tolist() == trace.positions_T.tolist()
    for rows in sequences(trace):
        assert (np.diff(trace.positions_T[rows]) == 1).all()
    runs = sum((number, position - 1) not in computed for number, position in computed)
    assert trace.num_sequences == runs
