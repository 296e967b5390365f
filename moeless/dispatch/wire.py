"""The messages between an engine and a worker: fixed binary headers and raw arrays, no pickle.

A call is one layer's rows and pairs; an answer is one gate-weighted partial sum for each row, or an error in words.
The same bytes travel in shared memory, over TCP and inside a Serve call; transports that move rows from GPU to GPU
send the frame without them.

Call:    CALL_HEADER | row of each pair (n) int32 | expert of each pair (n) int32 | weight (n) float32 | padding |
         rows (R, H)
Answer:  ANSWER_HEADER | partial sums (R, H)   or   ANSWER_HEADER | UTF-8 message
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moeless.core.arrays import Float32Array, Int64Array
from moeless.core.errors import TransportError

PROTOCOL_VERSION: Final = 1
_MAGIC: Final = 0x4D4F454C  # "MOEL"

CALL_HEADER: Final = struct.Struct("<IHHQIIII")
"""magic, version, dtype, sequence number, layer, rows, pairs, hidden size"""
ANSWER_HEADER: Final = struct.Struct("<IHHQIIII")
"""magic, version, status, sequence number, rows, hidden size, message bytes, dtype"""

STATUS_OK: Final = 0
STATUS_FUNCTION_UNAVAILABLE: Final = 1
STATUS_INTERNAL_ERROR: Final = 2

_ROWS_ALIGNMENT_BYTES: Final = 32
"""Rows begin at a multiple of this: vector instructions like it, and the headers happen to have this size."""
_MAX_CACHED_VIEWS: Final = 256
_ERROR_BYTES: Final = 2048

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_CODE: Final = {dtype: code for code, dtype in enumerate(_DTYPES)}

_Words = npt.NDArray[Any]
_Views = tuple[torch.Tensor, _Words]


class FailedCallError(TransportError):
    """The worker answered, in words: it could not compute the call. The channel is as good as before."""


class LayerCall(NamedTuple):
    """One layer's work for one worker. `x_TH` holds all tokens; `tokens_R` picks the worker's rows of it."""

    layer: int
    x_TH: torch.Tensor
    tokens_R: Int64Array
    rows_n: Int64Array
    experts_n: Int64Array
    """Sorted."""
    weights_n: Float32Array


class ReceivedCall(NamedTuple):
    """A LayerCall as the worker sees it; `x_RH` is a view of the transport's memory, the arrays are copies."""

    sequence: int
    layer: int
    x_RH: torch.Tensor
    rows_n: Int64Array
    experts_n: Int64Array
    weights_n: torch.Tensor


class CallHead(NamedTuple):
    """A call's header, its magic and version found right."""

    sequence: int
    layer: int
    num_rows: int
    num_pairs: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Length of the whole call."""
        return call_bytes(self.num_rows, self.num_pairs, self.hidden_size, self.dtype)


class Frame:
    """A transport's memory for calls or answers.

    Keeps the arrays that view it: between two processes the instructions are cold, and making them anew for each
    call takes several times longer than the copy.

    Args:
        buffer: writable bytes.
    """

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        num_words = len(buffer) // 4
        self.uint32 = np.frombuffer(buffer, dtype=np.uint32, count=num_words)
        self.float32 = self.uint32.view(np.float32)
        self._views: dict[tuple[int, int, int, torch.dtype], _Views] = {}

    def __len__(self) -> int:
        return len(self.buffer)

    def rows(self, offset: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> _Views:
        """The memory from `offset` on as a tensor (num_rows, hidden_size), and as numpy words of the same width.

        Raises: TransportError if it does not fit.
        """
        key = (offset, num_rows, hidden_size, dtype)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            views = self._views[key] = self._make_views(*key)
        return views

    def _make_views(self, offset: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> _Views:
        shape = (num_rows, hidden_size)
        count = num_rows * hidden_size
        needed = offset + count * dtype.itemsize
        if needed > len(self.buffer):
            raise TransportError(f"{num_rows} rows of {hidden_size} need {needed} bytes, got {len(self.buffer)}")
        if count == 0:
            return torch.empty(shape, dtype=dtype), np.empty(shape, dtype=_word_type(dtype))
        tensor = torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=offset).view(shape)
        return tensor, _words(tensor)


def call_bytes(num_rows: int, num_pairs: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of a call's frame."""
    return routing_bytes(num_pairs) + num_rows * hidden_size * dtype.itemsize


def routing_bytes(num_pairs: int) -> int:
    """Size of a call's frame without its rows, which begin there."""
    used = CALL_HEADER.size + 12 * num_pairs
    return -(-used // _ROWS_ALIGNMENT_BYTES) * _ROWS_ALIGNMENT_BYTES


def answer_bytes(num_rows: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of an answer's frame."""
    return ANSWER_HEADER.size + num_rows * hidden_size * dtype.itemsize


def max_answer_bytes(max_rows: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of the largest answer's frame; an error in words fits, too."""
    return max(answer_bytes(max_rows, hidden_size, dtype), ANSWER_HEADER.size + _ERROR_BYTES)


def write_call(frame: Frame, call: LayerCall, sequence: int) -> int:
    """Write a call into `frame` (large enough); returns its length. Copies each row once."""
    offset = write_routing(frame, call, sequence)
    x_TH = call.x_TH
    num_rows, hidden, dtype = len(call.tokens_R), x_TH.shape[1], x_TH.dtype
    target, words = frame.rows(offset, num_rows, hidden, dtype)
    if x_TH.is_cuda:
        target.copy_(gather_rows(call))
    elif num_rows == len(x_TH):
        words[:] = _words(x_TH)
    else:
        # "clip", because numpy copies twice where it must be able to raise before it wrote.
        np.take(_words(x_TH), call.tokens_R, axis=0, out=words, mode="clip")
    return offset + num_rows * hidden * dtype.itemsize


def write_routing(frame: Frame, call: LayerCall, sequence: int) -> int:
    """Write a call without its rows; returns the length, at which the rows belong.

    Raises: TransportError if the pairs do not fit; ValueError for a dtype that cannot be sent.
    """
    num_rows, num_pairs = len(call.tokens_R), len(call.rows_n)
    begin = CALL_HEADER.size // 4
    middle, end = begin + num_pairs, begin + 2 * num_pairs
    if end + num_pairs > len(frame.uint32):
        raise TransportError(f"{num_pairs} pairs need {4 * (end + num_pairs)} bytes, got {len(frame)}")
    dtype_code = _code_of(call.x_TH.dtype)
    CALL_HEADER.pack_into(
        frame.buffer,
        0,
        _MAGIC,
        PROTOCOL_VERSION,
        dtype_code,
        sequence,
        call.layer,
        num_rows,
        num_pairs,
        call.x_TH.shape[1],
    )
    frame.uint32[begin:middle] = call.rows_n
    frame.uint32[middle:end] = call.experts_n
    frame.float32[end : end + num_pairs] = call.weights_n
    return routing_bytes(num_pairs)


def gather_rows(call: LayerCall) -> torch.Tensor:
    """The call's rows, on their device."""
    if len(call.tokens_R) == len(call.x_TH):
        return call.x_TH
    return call.x_TH.index_select(0, torch.from_numpy(call.tokens_R).to(call.x_TH.device, non_blocking=True))


def read_call(frame: Frame, *, max_rows: int, num_experts: Sequence[int]) -> ReceivedCall:
    """Check a call and view its rows in place.

    Args:
        max_rows: most rows that this side takes.
        num_experts: experts of each layer.
    Raises: TransportError naming what is wrong.
    """
    head = read_call_head(frame.buffer)
    if head.num_rows > max_rows:
        raise TransportError(f"a call may have {max_rows} rows, got {head.num_rows}")
    x_RH, _ = frame.rows(routing_bytes(head.num_pairs), head.num_rows, head.hidden_size, head.dtype)
    return receive_call(frame, head, x_RH, num_experts=num_experts)


def read_call_head(buffer: memoryview) -> CallHead:
    """Check a call's header. Raises TransportError if it is none."""
    if len(buffer) < CALL_HEADER.size:
        raise TransportError(f"a call must have at least {CALL_HEADER.size} bytes, got {len(buffer)}")
    magic, version, code, sequence, layer, rows, pairs, hidden = CALL_HEADER.unpack_from(buffer)
    if magic != _MAGIC or version != PROTOCOL_VERSION or code >= len(_DTYPES):
        raise TransportError(f"not a call of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    return CallHead(sequence, layer, rows, pairs, hidden, _DTYPES[code])


def receive_call(frame: Frame, head: CallHead, x_RH: torch.Tensor, *, num_experts: Sequence[int]) -> ReceivedCall:
    """Check and copy a call's pairs; its rows may lie elsewhere than in `frame`.

    Raises: TransportError naming what is wrong.
    """
    layer, num_pairs = head.layer, head.num_pairs
    if layer >= len(num_experts):
        raise TransportError(f"layer must be below {len(num_experts)}, got {layer}")
    begin = CALL_HEADER.size // 4
    middle, end = begin + num_pairs, begin + 2 * num_pairs
    if end + num_pairs > len(frame.uint32):
        raise TransportError(f"{num_pairs} pairs need {4 * (end + num_pairs)} bytes, got {len(frame)}")
    rows_n = frame.uint32[begin:middle].astype(np.int64)
    experts_n = frame.uint32[middle:end].astype(np.int64)
    if num_pairs:
        if np.maximum.reduce(rows_n) >= head.num_rows:
            raise TransportError(f"rows of pairs must be below {head.num_rows}, got {rows_n.max()}")
        if experts_n[-1] >= num_experts[layer] or np.logical_or.reduce(experts_n[1:] < experts_n[:-1]):
            raise TransportError(f"experts of pairs must be sorted and below {num_experts[layer]}")
    weights_n = torch.from_numpy(frame.float32[end : end + num_pairs].copy())
    return ReceivedCall(head.sequence, layer, x_RH, rows_n, experts_n, weights_n)


def write_answer(frame: Frame, sequence: int, partial_RH: torch.Tensor) -> int:
    """Write partial sums into `frame`; returns the length. Raises TransportError if they do not fit."""
    num_rows, hidden = partial_RH.shape
    target, words = frame.rows(ANSWER_HEADER.size, num_rows, hidden, partial_RH.dtype)
    write_answer_head(frame, sequence, partial_RH)
    if partial_RH.is_cuda:
        target.copy_(partial_RH)
    else:
        words[:] = _words(partial_RH)
    return ANSWER_HEADER.size + words.nbytes


def write_answer_head(frame: Frame, sequence: int, partial_RH: torch.Tensor) -> int:
    """Write the header of an answer whose rows may lie elsewhere than in `frame`; returns its length."""
    num_rows, hidden = partial_RH.shape
    code = _code_of(partial_RH.dtype)
    ANSWER_HEADER.pack_into(frame.buffer, 0, _MAGIC, PROTOCOL_VERSION, STATUS_OK, sequence, num_rows, hidden, 0, code)
    return ANSWER_HEADER.size


def write_error(frame: Frame, sequence: int, status: int, message: str) -> int:
    """Write an error into `frame`, cut to what fits; returns the length."""
    text = message.encode()[: len(frame) - ANSWER_HEADER.size]
    ANSWER_HEADER.pack_into(frame.buffer, 0, _MAGIC, PROTOCOL_VERSION, status, sequence, 0, 0, len(text), 0)
    end = ANSWER_HEADER.size + len(text)
    frame.buffer[ANSWER_HEADER.size : end] = text
    return end


def read_answer(frame: Frame, sequence: int, shape: tuple[int, int]) -> torch.Tensor:
    """The partial sums, viewed in place, which must have the call's rows and hidden size for `shape`.

    Raises: FailedCallError with the worker's words; TransportError for another call's answer or nonsense.
    """
    dtype = read_answer_head(frame, sequence, shape)
    return frame.rows(ANSWER_HEADER.size, *shape, dtype)[0]


def read_answer_head(frame: Frame, sequence: int, shape: tuple[int, int]) -> torch.dtype:
    """The dtype of an answer whose rows may lie elsewhere than in `frame`. Raises like read_answer."""
    buffer = frame.buffer
    if len(buffer) < ANSWER_HEADER.size:
        raise TransportError(f"an answer must have at least {ANSWER_HEADER.size} bytes, got {len(buffer)}")
    magic, version, status, got, rows, hidden, message_bytes, code = ANSWER_HEADER.unpack_from(buffer)
    if magic != _MAGIC or version != PROTOCOL_VERSION or code >= len(_DTYPES):
        raise TransportError(f"not an answer of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    if got != sequence:
        raise TransportError(f"answer to call {got} where call {sequence} was made")
    if status != STATUS_OK:
        text = bytes(buffer[ANSWER_HEADER.size : ANSWER_HEADER.size + message_bytes])
        raise FailedCallError(text.decode(errors="replace"))
    if (rows, hidden) != shape:
        raise TransportError(f"an answer must have the call's shape {shape}, got {(rows, hidden)}")
    return _DTYPES[code]


def answer_length(buffer: memoryview, *, rows_inside: bool = True) -> int:
    """Length of the whole answer that begins in `buffer`. Raises TransportError if it is none."""
    magic, version, _, _, rows, hidden, message_bytes, code = ANSWER_HEADER.unpack_from(buffer)
    if magic != _MAGIC or version != PROTOCOL_VERSION or code >= len(_DTYPES):
        raise TransportError(f"not an answer of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    length = answer_bytes(rows, hidden, _DTYPES[code]) if rows_inside else ANSWER_HEADER.size
    return length + int(message_bytes)


def _code_of(dtype: torch.dtype) -> int:
    code = _DTYPE_CODE.get(dtype)
    if code is None:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return code


def _words(tensor: torch.Tensor) -> _Words:
    """The tensor's memory as numpy sees it; numpy has no bfloat16, and copying needs only the width."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.view(torch.int16)
    words: _Words = tensor.numpy()
    return words


def _word_type(dtype: torch.dtype) -> type[np.generic]:
    return np.float32 if dtype is torch.float32 else np.int16
