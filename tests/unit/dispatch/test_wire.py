"""Frames: what is written is read again, and nothing that arrives can do worse than a TransportError."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeless.core.errors import TransportError
from moeless.dispatch import wire
from moeless.dispatch.wire import Frame, LayerCall

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUM_EXPERTS = [4, 9]
MAX_ROWS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def layer_calls(draw: st.DrawFn) -> LayerCall:
    layer = draw(st.integers(0, len(NUM_EXPERTS) - 1))
    num_tokens = draw(st.integers(1, MAX_ROWS))
    num_rows = draw(st.integers(1, num_tokens))
    hidden = draw(st.integers(1, 9))
    experts_n = sorted(draw(st.lists(st.integers(0, NUM_EXPERTS[layer] - 1), max_size=20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return LayerCall(
        layer=layer,
        x_TH=torch.from_numpy(rng.standard_normal((num_tokens, hidden))).to(draw(st.sampled_from(DTYPES))),
        tokens_R=np.sort(rng.choice(num_tokens, num_rows, replace=False)),
        rows_n=rng.integers(0, num_rows, len(experts_n)),
        experts_n=np.array(experts_n, dtype=np.int64),
        weights_n=rng.random(len(experts_n), dtype=np.float32),
    )


def written(call: LayerCall, sequence: int = 1) -> bytearray:
    num_rows, hidden = len(call.tokens_R), call.x_TH.shape[1]
    buffer = bytearray(wire.call_bytes(num_rows, len(call.rows_n), hidden, call.x_TH.dtype))
    assert wire.write_call(Frame(memoryview(buffer)), call, sequence) == len(buffer)
    return buffer


def read(buffer: bytearray) -> wire.ReceivedCall:
    return wire.read_call(Frame(memoryview(buffer)), max_rows=MAX_ROWS, num_experts=NUM_EXPERTS)


@unhurried
@given(call=layer_calls(), sequence=st.integers(0, 2**64 - 1))
def test_a_call_is_read_as_it_was_written(call: LayerCall, sequence: int) -> None:
    received = read(written(call, sequence))
    assert (received.sequence, received.layer) == (sequence, call.layer)
    assert received.x_RH.dtype == call.x_TH.dtype
    assert torch.equal(received.x_RH, call.x_TH[torch.from_numpy(call.tokens_R)])
    assert received.rows_n.tolist() == call.rows_n.tolist()
    assert received.experts_n.tolist() == call.experts_n.tolist()
    assert received.weights_n.tolist() == call.weights_n.tolist()


@unhurried
@given(call=layer_calls())
def test_a_call_tells_its_length_by_its_header(call: LayerCall) -> None:
    buffer = written(call)
    assert wire.read_call_head(memoryview(buffer)[: wire.CALL_HEADER.size]).num_bytes == len(buffer)


def test_rows_of_tensors_with_gaps_are_gathered() -> None:
    wide_TH = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    call = LayerCall(
        layer=0,
        x_TH=wide_TH[:, 1:4],
        tokens_R=np.array([1, 3]),
        rows_n=np.array([0]),
        experts_n=np.array([0]),
        weights_n=np.ones(1, dtype=np.float32),
    )
    assert read(written(call)).x_RH.tolist() == [[7, 8, 9], [19, 20, 21]]


def test_later_writes_of_the_sender_do_not_change_the_pairs() -> None:
    call = LayerCall(
        layer=0,
        x_TH=torch.ones(1, 2),
        tokens_R=np.array([0]),
        rows_n=np.array([0]),
        experts_n=np.array([3]),
        weights_n=np.ones(1, dtype=np.float32),
    )
    buffer = written(call)
    received = read(buffer)
    buffer[wire.CALL_HEADER.size :] = b"\xff" * (len(buffer) - wire.CALL_HEADER.size)
    assert (received.rows_n.tolist(), received.experts_n.tolist(), received.weights_n.tolist()) == ([0], [3], [1.0])


@unhurried
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    sequence=st.integers(0, 2**64 - 1),
)
def test_an_answer_is_read_as_it_was_written(shape: tuple[int, int], dtype: torch.dtype, sequence: int) -> None:
    partial_RH = torch.randn(shape).to(dtype)
    buffer = bytearray(wire.answer_bytes(*shape, dtype))
    frame = Frame(memoryview(buffer))
    assert wire.write_answer(frame, sequence, partial_RH) == len(buffer) == wire.answer_length(frame.buffer)
    assert torch.equal(wire.read_answer(frame, sequence, shape), partial_RH)


def test_an_error_is_raised_with_the_workers_words() -> None:
    frame = Frame(memoryview(bytearray(200)))
    length = wire.write_error(frame, 3, wire.STATUS_FUNCTION_UNAVAILABLE, "function L00.E001 does not fit — büh")
    assert wire.answer_length(frame.buffer) == length
    with pytest.raises(wire.FailedCallError, match=r"^function L00.E001 does not fit — büh$"):
        wire.read_answer(frame, 3, (1, 1))


def test_an_error_too_long_for_its_frame_is_cut() -> None:
    frame = Frame(memoryview(bytearray(wire.ANSWER_HEADER.size + 10)))
    assert wire.write_error(frame, 3, wire.STATUS_INTERNAL_ERROR, "x" * 100) == len(frame)
    with pytest.raises(wire.FailedCallError, match=r"^x{10}$"):
        wire.read_answer(frame, 3, (1, 1))


def test_the_answer_to_another_call_is_refused() -> None:
    frame = Frame(memoryview(bytearray(wire.answer_bytes(1, 2, torch.float32))))
    wire.write_answer(frame, 4, torch.ones(1, 2))
    with pytest.raises(TransportError, match="answer to call 4 where call 5 was made") as raised:
        wire.read_answer(frame, 5, (1, 2))
    assert not isinstance(raised.value, wire.FailedCallError)


def test_an_answer_of_another_shape_is_refused() -> None:
    frame = Frame(memoryview(bytearray(wire.answer_bytes(2, 2, torch.float32))))
    wire.write_answer(frame, 4, torch.ones(2, 2))
    with pytest.raises(TransportError, match=r"must have the call's shape \(1, 2\), got \(2, 2\)"):
        wire.read_answer(frame, 4, (1, 2))


def test_an_answer_that_does_not_fit_is_refused_before_it_is_written() -> None:
    buffer = bytearray(wire.answer_bytes(1, 2, torch.float32))
    with pytest.raises(TransportError, match="2 rows of 2 need 48 bytes, got 40"):
        wire.write_answer(Frame(memoryview(buffer)), 1, torch.ones(2, 2))
    assert not any(buffer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, "layer must be below 2, got 2"),
        ({"rows_n": [0, 2]}, "rows of pairs must be below 2, got 2"),
        ({"rows_n": [0, -1]}, "rows of pairs must be below 2"),
        ({"experts_n": [1, 4]}, "sorted and below 4"),
        ({"experts_n": [-1, 1]}, "sorted and below 4"),
        ({"experts_n": [2, 1]}, "sorted and below 4"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    call = LayerCall(
        layer=0,
        x_TH=torch.ones(2, 3),
        tokens_R=np.arange(2),
        rows_n=np.array([0, 1]),
        experts_n=np.array([0, 1]),
        weights_n=np.ones(2, dtype=np.float32),
    )
    arrays = {name: np.array(value) if isinstance(value, list) else value for name, value in changes.items()}
    with pytest.raises(TransportError, match=message):
        read(written(call._replace(**arrays)))


def test_a_call_of_too_many_rows_is_refused() -> None:
    num_rows = MAX_ROWS + 1
    call = LayerCall(
        layer=0,
        x_TH=torch.ones(num_rows, 3),
        tokens_R=np.arange(num_rows),
        rows_n=np.array([0]),
        experts_n=np.array([0]),
        weights_n=np.ones(1, dtype=np.float32),
    )
    with pytest.raises(TransportError, match="a call may have 16 rows, got 17"):
        read(written(call))


@unhurried
@given(data=st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_transport_error(data: bytes) -> None:
    buffer = bytearray(data)
    for reader in (read, lambda b: wire.read_answer(Frame(memoryview(b)), 0, (1, 1))):
        with pytest.raises(TransportError):
            reader(buffer)


@unhurried
@given(call=layer_calls(), data=st.data())
def test_no_damage_to_a_call_raises_anything_but_a_transport_error(call: LayerCall, data: st.DataObject) -> None:
    buffer = written(call)
    for _ in range(data.draw(st.integers(1, 4))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    del buffer[len(buffer) - data.draw(st.integers(0, len(buffer))) :]
    try:
        received = read(buffer)
    except TransportError:
        return
    assert len(received.x_RH) <= MAX_ROWS
    assert all(0 <= row < len(received.x_RH) for row in received.rows_n)
    assert all(0 <= expert < NUM_EXPERTS[received.layer] for expert in received.experts_n)


@unhurried
@given(data=st.data())
def test_no_damage_to_an_answer_raises_anything_but_a_transport_error(data: st.DataObject) -> None:
    buffer = bytearray(wire.answer_bytes(2, 3, torch.float32))
    wire.write_answer(Frame(memoryview(buffer)), 1, torch.ones(2, 3))
    for _ in range(data.draw(st.integers(1, 4))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    del buffer[len(buffer) - data.draw(st.integers(0, len(buffer))) :]
    try:
        assert wire.read_answer(Frame(memoryview(buffer)), 1, (2, 3)).shape == (2, 3)
    except TransportError:
        return


def test_views_of_many_shapes_do_not_pile_up() -> None:
    frame = Frame(memoryview(bytearray(4096)))
    for num_rows in range(1, 20):
        for hidden in range(1, 20):
            tensor, _ = frame.rows(64, num_rows, hidden, torch.float32)
            assert tensor.shape == (num_rows, hidden)
    assert len(frame._views) <= wire._MAX_CACHED_VIEWS
