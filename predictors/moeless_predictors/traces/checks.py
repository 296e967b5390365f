"""Rules for the columns of a routing trace. Each error names row, layer and choice.

Called by traces.routing, for new traces and for files; works through the rows in blocks.
Shapes: T tokens, L MoE layers, k experts per token, S sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moeless_predictors.arrays import AnyArray, FloatArray, IntArray
from moeless_predictors.traces.container import TraceFormatError

_BLOCK_VALUES = 1 << 20
_MAX_FLOAT16 = float(np.finfo(np.float16).max)
_MAX_INT32 = int(np.iinfo(np.int32).max)


def check_choices(where: str, experts_TLk: IntArray, weights_TLk: FloatArray, *, num_experts: int) -> None:
    """Experts from 0 to num_experts - 1, none twice for one token and layer; weights finite, >= 0 and in float16."""
    for rows in _row_blocks(experts_TLk):
        experts_nLk = experts_TLk[rows]
        if at := _first((experts_nLk < 0) | (experts_nLk >= num_experts)):
            row, layer, choice = at
            raise TraceFormatError(
                f"{where}: column 'experts', row {rows.start + row}, layer {layer}, choice {choice}: "
                f"must be from 0 to {num_experts - 1}, got {experts_nLk[at]}"
            )
        ordered_nLk = np.sort(experts_nLk, axis=2)
        if at := _first(ordered_nLk[:, :, 1:] == ordered_nLk[:, :, :-1]):
            row, layer, _ = at
            raise TraceFormatError(
                f"{where}: column 'experts', row {rows.start + row}, layer {layer}: "
                f"the experts of a token must differ, got {experts_nLk[row, layer].tolist()}"
            )
        weights_nLk = weights_TLk[rows]
        if at := _first(~((weights_nLk >= 0) & (weights_nLk <= _MAX_FLOAT16))):
            row, layer, choice = at
            raise TraceFormatError(
                f"{where}: column 'weights', row {rows.start + row}, layer {layer}, choice {choice}: "
                f"must be from 0 to {_MAX_FLOAT16:.0f}, got {weights_nLk[at]}"
            )


def check_starts(where: str, starts_S1: IntArray, *, num_tokens: int) -> None:
    """Offsets from 0 to the number of tokens, each above the one before."""
    if len(starts_S1) < 2:
        raise TraceFormatError(f"{where}: a trace must have at least one sequence, got none")
    if starts_S1[0] != 0:
        raise TraceFormatError(f"{where}: column 'sequence_starts' must begin with 0, got {starts_S1[:2].tolist()}")
    if at := _first(np.diff(starts_S1) < 1):
        raise TraceFormatError(
            f"{where}: column 'sequence_starts', sequence {at[0]}: must have at least one token, "
            f"got rows {starts_S1[at[0]]} to {starts_S1[at[0] + 1]}"
        )
    if starts_S1[-1] != num_tokens:
        raise TraceFormatError(
            f"{where}: the lengths of the {len(starts_S1) - 1} sequences must add up to the {num_tokens} tokens, "
            f"got {starts_S1[-1]}"
        )


def check_positions(where: str, positions_T: IntArray, starts_S1: IntArray) -> None:
    """In each sequence every position is >= 0 and above the one of the row before."""
    check_range(where, "positions", positions_T, low=0, high=_MAX_INT32)
    is_falling = np.diff(positions_T.astype(np.int64)) < 1
    is_falling[starts_S1[1:-1] - 1] = False
    if at := _first(is_falling):
        row = at[0] + 1
        raise TraceFormatError(
            f"{where}: column 'positions', row {row}: must be above {positions_T[row - 1]}, the position of the "
            f"sequence's row before, got {positions_T[row]}"
        )


def check_range(where: str, name: str, values_T: IntArray, *, low: int, high: int) -> None:
    """Every value is from low to high."""
    if at := _first((values_T < low) | (values_T > high)):
        raise TraceFormatError(
            f"{where}: column {name!r}, row {at[0]}: must be from {low} to {high}, got {values_T[at[0]]}"
        )


def check_finite(where: str, name: str, values_TH: FloatArray) -> None:
    """No value is NaN or infinite."""
    for rows in _row_blocks(values_TH):
        if at := _first(~np.isfinite(values_TH[rows])):
            index = (rows.start + at[0], *at[1:])
            raise TraceFormatError(
                f"{where}: column {name!r}, row {index[0]}: must be finite, got {values_TH[index]} at {list(index[1:])}"
            )


def check_shapes(where: str, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
    """Each column's shape, the first of the pair, is what the trace asks for, the second."""
    for name, (found, expected) in shapes.items():
        if tuple(found) != tuple(expected):
            raise TraceFormatError(f"{where}: column {name!r} must have the shape {list(expected)}, got {list(found)}")


def _row_blocks(values: AnyArray) -> Iterator[slice]:
    row_values = max(1, values[0].size) if len(values) else 1
    step = max(1, _BLOCK_VALUES // row_values)
    for begin in range(0, len(values), step):
        yield slice(begin, min(begin + step, len(values)))


def _first(is_fault: AnyArray) -> tuple[int, ...] | None:
    """Index of the first fault."""
    if not is_fault.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(is_fault.argmax()), is_fault.shape))
