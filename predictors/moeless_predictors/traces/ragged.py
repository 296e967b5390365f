"""Lists of unequal lengths as two columns: the values of all, and where each list starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from moeless_predictors.arrays import AnyArray, IntArray
from moeless_predictors.traces.container import TraceFormatError


def join_texts(texts: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Texts as one column of UTF-8 and a column of n + 1 offsets in bytes."""
    encoded = [text.encode() for text in texts]
    starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), starts


def split_texts(where: str, utf8: AnyArray, starts: AnyArray) -> tuple[str, ...]:
    """The texts of `join_texts`. Raises TraceFormatError for offsets or bytes that make no texts."""
    if utf8.dtype != np.uint8 or starts.dtype != np.int64 or utf8.ndim != 1:
        raise TraceFormatError(
            f"{where}: labels must be UTF-8 bytes and int64 offsets, got {utf8.dtype}, {starts.dtype}"
        )
    check_offsets(where, "label_starts", starts, num_values=len(utf8))
    raw = utf8.tobytes()
    try:
        return tuple(raw[begin:end].decode() for begin, end in pairwise(starts))
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{where}: column 'labels' must be UTF-8: {error}") from error


def check_offsets(where: str, name: str, starts: IntArray, *, num_values: int) -> None:
    """Offsets begin at 0, never fall and end at the number of values."""
    if starts.ndim != 1 or len(starts) < 1 or starts[0] != 0 or starts[-1] != num_values:
        ends = starts.reshape(-1)[:: max(1, starts.size - 1)].tolist()
        raise TraceFormatError(f"{where}: column {name!r} must go from 0 to {num_values}, got {ends}")
    is_falling = np.diff(starts) < 0
    if is_falling.any():
        row = int(is_falling.argmax()) + 1
        raise TraceFormatError(
            f"{where}: column {name!r}, row {row}: must be at least {starts[row - 1]}, got {starts[row]}"
        )
