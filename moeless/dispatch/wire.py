"""The messages between an engine and a worker: fixed binary headers and raw arrays, no pickle.

A call is one layer's rows and pairs; an answer is one gate-weighted partial sum for each row, or an error in words.
The same bytes travel in shared memory, over TCP and inside a Serve call.

Call:    CALL_HEADER | rows (R, H) | row of each pair (n) int32 | expert of each pair (n) int32 | weight (n) float32
Answer:  ANSWER_HEADER | partial sums (R, H)   or   ANSWER_HEADER | UTF-8 message
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

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

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_CODE: Final = {dtype: code for code, dtype in enumerate(_DTYPES)}

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's work for one worker. `x_TH` holds all tokens; `tokens_R` picks the worker's rows of it."""

    layer: int
    x_TH: torch.Tensor
    tokens_R: IntArray
    rows_n: IntArray
    experts_n: IntArray
    """Sorted."""
    weights_n: torch.Tensor
    """float32, on the CPU."""


@dataclass(frozen=True, slots=True)
class ReceivedCall:
    """A LayerCall as the worker sees it; the tensors are views of the transport's memory."""

    sequence: int
    layer: int
    x_RH: torch.Tensor
    rows_n: IntArray
    experts_n: IntArray
    weights_n: torch.Tensor


def call_bytes(num_rows: int, num_pairs: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of a call's frame."""
    return CALL_HEADER.size + num_rows * hidden_size * dtype.itemsize + 12 * num_pairs


def answer_bytes(num_rows: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of an answer's frame."""
    return ANSWER_HEADER.size + num_rows * hidden_size * dtype.itemsize


def write_call(frame: memoryview, call: LayerCall, sequence: int) -> int:
    """Write a call into `frame` (writable, large enough); returns its length. Copies each row once."""
    num_rows, num_pairs, hidden = len(call.tokens_R), len(call.rows_n), call.x_TH.shape[1]
    dtype = call.x_TH.dtype
    CALL_HEADER.pack_into(
        frame,
        0,
        _MAGIC,
        PROTOCOL_VERSION,
        _DTYPE_CODE[dtype],
        sequence,
        call.layer,
        num_rows,
        num_pairs,
        hidden,
    )
    rows_end = CALL_HEADER.size + num_rows * hidden * dtype.itemsize
    target = tensor_view(frame, CALL_HEADER.size, (num_rows, hidden), dtype)
    if num_rows == len(call.x_TH):
        target.copy_(call.x_TH)
    elif call.x_TH.is_cuda:
        target.copy_(call.x_TH.index_select(0, torch.from_numpy(call.tokens_R).to(call.x_TH.device)))
    else:
        torch.index_select(call.x_TH, 0, torch.from_numpy(call.tokens_R), out=target)
    ints = np.frombuffer(frame, dtype=np.int32, count=2 * num_pairs, offset=rows_end)
    ints[:num_pairs] = call.rows_n
    ints[num_pairs:] = call.experts_n
    weights = np.frombuffer(frame, dtype=np.float32, count=num_pairs, offset=rows_end + 8 * num_pairs)
    weights[:] = call.weights_n.numpy()
    return rows_end + 12 * num_pairs


def read_call(frame: memoryview, *, max_rows: int, num_experts: list[int]) -> ReceivedCall:
    """Check a call and view its arrays in place.

    Args:
        max_rows: most rows that this side takes.
        num_experts: experts of each layer.
    Raises: TransportError naming what is wrong.
    """
    if len(frame) < CALL_HEADER.size:
        raise TransportError(f"call must have at least {CALL_HEADER.size} bytes, got {len(frame)}")
    magic, version, dtype_code, sequence, layer, rows, pairs, hidden = CALL_HEADER.unpack_from(frame)
    if magic != _MAGIC or version != PROTOCOL_VERSION or dtype_code >= len(_DTYPES):
        raise TransportError(f"not a call of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    if layer >= len(num_experts):
        raise TransportError(f"layer must be below {len(num_experts)}, got {layer}")
    if rows > max_rows:
        raise TransportError(f"a call may have {max_rows} rows, got {rows}")
    dtype = _DTYPES[dtype_code]
    needed = call_bytes(rows, pairs, hidden, dtype)
    if len(frame) < needed:
        raise TransportError(f"call of {rows} rows and {pairs} pairs must have {needed} bytes, got {len(frame)}")
    offset = CALL_HEADER.size + rows * hidden * dtype.itemsize
    ints = np.frombuffer(frame, dtype=np.int32, count=2 * pairs, offset=offset).astype(np.int64)
    rows_n, experts_n = ints[:pairs], ints[pairs:]
    if pairs and not (0 <= rows_n.min() and rows_n.max() < rows):
        raise TransportError(f"rows of pairs must be in [0, {rows}), got {rows_n.min()} to {rows_n.max()}")
    if pairs and not (0 <= experts_n[0] and experts_n[-1] < num_experts[layer] and (np.diff(experts_n) >= 0).all()):
        raise TransportError(f"experts of pairs must be sorted and in [0, {num_experts[layer]})")
    weights = np.frombuffer(frame, dtype=np.float32, count=pairs, offset=offset + 8 * pairs)
    return ReceivedCall(
        sequence=sequence,
        layer=layer,
        x_RH=tensor_view(frame, CALL_HEADER.size, (rows, hidden), dtype),
        rows_n=rows_n,
        experts_n=experts_n,
        weights_n=torch.from_numpy(weights.copy()),
    )


def write_answer(frame: memoryview, sequence: int, partial_RH: torch.Tensor) -> int:
    """Write partial sums into `frame`; returns the length."""
    rows, hidden = partial_RH.shape
    code = _DTYPE_CODE[partial_RH.dtype]
    ANSWER_HEADER.pack_into(frame, 0, _MAGIC, PROTOCOL_VERSION, STATUS_OK, sequence, rows, hidden, 0, code)
    tensor_view(frame, ANSWER_HEADER.size, (rows, hidden), partial_RH.dtype).copy_(partial_RH)
    return answer_bytes(rows, hidden, partial_RH.dtype)


def write_error(frame: memoryview, sequence: int, status: int, message: str) -> int:
    """Write an error into `frame`, cut to what fits; returns the length."""
    text = message.encode()[: len(frame) - ANSWER_HEADER.size]
    ANSWER_HEADER.pack_into(frame, 0, _MAGIC, PROTOCOL_VERSION, status, sequence, 0, 0, len(text), 0)
    frame[ANSWER_HEADER.size : ANSWER_HEADER.size + len(text)] = text
    return ANSWER_HEADER.size + len(text)


def read_answer(frame: memoryview, sequence: int) -> torch.Tensor:
    """The partial sums, viewed in place.

    Raises: TransportError for an error answer (with the worker's words), another call's answer or nonsense.
    """
    if len(frame) < ANSWER_HEADER.size:
        raise TransportError(f"answer must have at least {ANSWER_HEADER.size} bytes, got {len(frame)}")
    magic, version, status, got, rows, hidden, message_bytes, code = ANSWER_HEADER.unpack_from(frame)
    if magic != _MAGIC or version != PROTOCOL_VERSION or code >= len(_DTYPES):
        raise TransportError(f"not an answer of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    if got != sequence:
        raise TransportError(f"answer to call {got} where call {sequence} was made")
    if status != STATUS_OK:
        text = bytes(frame[ANSWER_HEADER.size : ANSWER_HEADER.size + message_bytes]).decode(errors="replace")
        raise TransportError(text)
    return tensor_view(frame, ANSWER_HEADER.size, (rows, hidden), _DTYPES[code])


def answer_length(header: memoryview) -> int:
    """Length of the whole answer whose header is given."""
    _, _, _, _, rows, hidden, message_bytes, code = ANSWER_HEADER.unpack_from(header)
    itemsize = _DTYPES[code].itemsize if code < len(_DTYPES) else 0
    return ANSWER_HEADER.size + int(message_bytes) + int(rows) * int(hidden) * itemsize


def call_length(header: memoryview) -> int:
    """Length of the whole call whose header is given. Raises TransportError if it is none."""
    magic, version, code, _, _, rows, pairs, hidden = CALL_HEADER.unpack_from(header)
    if magic != _MAGIC or version != PROTOCOL_VERSION or code >= len(_DTYPES):
        raise TransportError(f"not a call of protocol {PROTOCOL_VERSION}: magic {magic:#x}, version {version}")
    return call_bytes(rows, pairs, hidden, _DTYPES[code])


def tensor_view(frame: memoryview, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over `frame`'s memory."""
    count = int(np.prod(shape))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(frame, dtype=dtype, count=count, offset=offset).view(shape)
