"""Arrival traces: when requests came, how long they were, and which prompt blocks they shared.

Shapes: R requests, N blocks of all prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.traces.checks import check_range, check_shapes
from moeless_predictors.traces.container import TraceFormatError, read_container, write_container
from moeless_predictors.traces.ragged import check_offsets

_INT32 = int(np.iinfo(np.int32).max)
_DTYPES = {
    "arrival_s": np.float64,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "block_hashes": np.int64,
    "block_starts": np.int64,
}
_OPTIONAL = {"block_hashes", "block_starts"}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ArrivalTrace:
    """A checked trace of requests in the order they came. Made by `from_arrays` or `open`.

    The arrays may be mapped from a file and must not be written to.
    """

    arrival_s: FloatArray
    """Seconds since the first request, float64, never falling."""
    prompt_tokens: IntArray
    """int32."""
    output_tokens: IntArray
    """int32."""
    block_hashes: IntArray | None = None
    """Names of the prompts' blocks, request by request, int64: prompts that begin alike share their first blocks."""
    block_starts: IntArray | None = None
    """Start of each request's blocks in `block_hashes`, and at the end their number, int64."""
    source: str = ""
    """Source of the trace, in words."""

    @classmethod
    def from_arrays(
        cls,
        *,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        block_hashes: Sequence[Sequence[int]] | None = None,
        source: str = "",
        where: str = "trace",
    ) -> Self:
        """Check arrays and make a trace of them.

        Args:
            arrival_s: seconds from any origin, in order; the trace counts from the first.
            block_hashes: for each request the names of its prompt's blocks.
            where: what messages call the origin of the arrays, a file's name say.
        Raises: TraceFormatError that names column and row.
        """
        arrivals = np.asarray(arrival_s, dtype=np.float64)
        hashes = starts = None
        if block_hashes is not None:
            starts = np.cumsum([0, *map(len, block_hashes)], dtype=np.int64)
            hashes = np.array([name for names in block_hashes for name in names], dtype=np.int64)
            check_shapes(where, {"block_hashes": ((len(block_hashes),), arrivals.shape)})
        draft = cls(
            arrival_s=arrivals - arrivals.reshape(-1)[:1],
            prompt_tokens=np.asarray(prompt_tokens),
            output_tokens=np.asarray(output_tokens),
            block_hashes=hashes,
            block_starts=starts,
            source=source,
        )
        draft._check(where)
        return replace(
            draft,
            prompt_tokens=draft.prompt_tokens.astype(np.int32, copy=False),
            output_tokens=draft.output_tokens.astype(np.int32, copy=False),
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Map a trace from its file.

        Args:
            verify: read the whole file once and compare it with its checksums.
        Raises: TraceFormatError with the position of the fault; OSError if the file cannot be read.
        """
        container = read_container(path, kind="arrivals", verify=verify)
        columns = container.columns
        if missing := _DTYPES.keys() - _OPTIONAL - columns.keys():
            raise TraceFormatError(f"{path}: columns are missing: {', '.join(sorted(missing))}")
        if odd := columns.keys() - _DTYPES.keys():
            raise TraceFormatError(f"{path}: unknown columns: {', '.join(sorted(odd))}")
        for name, column in columns.items():
            if column.dtype != _DTYPES[name]:
                expected = np.dtype(_DTYPES[name])
                raise TraceFormatError(f"{path}: column {name!r} must have the type {expected}, got {column.dtype}")
        trace = cls(**columns, source=str(container.fields.get("source", "")))
        trace._check(str(path))
        return trace

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file, all or nothing."""
        columns = {name: getattr(self, name) for name in _DTYPES}
        present = {name: np.ascontiguousarray(column) for name, column in columns.items() if column is not None}
        write_container(path, kind="arrivals", fields={"source": self.source}, columns=present)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first request to the last."""
        return float(self.arrival_s[-1])

    def blocks_of(self, request: int) -> IntArray:
        """Names of the blocks of one request's prompt; none where the trace has no blocks."""
        if self.block_hashes is None or self.block_starts is None:
            return np.empty(0, dtype=np.int64)
        return self.block_hashes[self.block_starts[request] : self.block_starts[request + 1]]

    def __repr__(self) -> str:
        return f"ArrivalTrace(source={self.source!r}, num_requests={self.num_requests}, duration_s={self.duration_s})"

    def _check(self, where: str) -> None:
        arrival_s, num_requests = self.arrival_s, len(self.arrival_s)
        if arrival_s.ndim != 1 or not num_requests:
            raise TraceFormatError(f"{where}: a trace must have at least one request, got shape {arrival_s.shape}")
        is_fault = ~np.isfinite(arrival_s) | (np.diff(arrival_s, prepend=0.0) < 0)
        if is_fault.any():
            row = int(is_fault.argmax())
            rule = f"at least {arrival_s[row - 1]}, that of the row before" if row else "finite and >= 0"
            raise TraceFormatError(f"{where}: column 'arrival_s', row {row}: must be {rule}, got {arrival_s[row]}")
        for name in ("prompt_tokens", "output_tokens"):
            column = getattr(self, name)
            if column.dtype.kind not in "iu":
                raise TraceFormatError(f"{where}: column {name!r} must hold whole numbers, got {column.dtype}")
            check_shapes(where, {name: (column.shape, (num_requests,))})
            check_range(where, name, column, low=0, high=_INT32)
        if (self.block_hashes is None) != (self.block_starts is None):
            raise TraceFormatError(f"{where}: block_hashes and block_starts must come together")
        if self.block_hashes is not None and self.block_starts is not None:
            check_shapes(where, {"block_starts": (self.block_starts.shape, (num_requests + 1,))})
            check_offsets(where, "block_starts", self.block_starts, num_values=self.block_hashes.size)
