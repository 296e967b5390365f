"""Routing of simulated requests: each follows one recorded sequence, from its start and round again.

Counting the tokens of a prompt's chunk costs the same however long it is: the counts before every block of rows are
kept, and a chunk's are the difference of two of them.

Shapes: L MoE layers, E experts, k experts per token, C = L x E cells (functions), S sequences, B blocks, n tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray, IntArray
from moeless_predictors.traces import RoutingTrace

_PREFIX_BYTES = 256 << 20
_MIN_BLOCK = 16


class SequenceRouting:
    """Counts of tokens per function, of any part of a request. Loads are flat, of shape (C,)."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.num_layers, self.num_experts, self.top_k = trace.num_layers, trace.num_experts, trace.top_k
        self.num_cells = self.num_layers * self.num_experts
        self.starts_S1 = np.asarray(trace.sequence_starts_S1)
        self.lengths_S = np.diff(self.starts_S1)
        self._experts_TLk = np.ascontiguousarray(trace.experts_TLk)
        self._offsets_L1 = (np.arange(self.num_layers) * self.num_experts)[:, np.newaxis]
        fitting = trace.num_tokens * self.num_cells * 4 // _PREFIX_BYTES
        self._block = max(_MIN_BLOCK, 1 << int(fitting).bit_length())
        self._first_block_S, self._before_BC = self._prefixes()

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.lengths_S)

    def per_token_LE(self) -> FloatArray:
        """Mean tokens of each function for a token of the trace, shape (L, E): a layer's sum to k."""
        counts_C = np.zeros(self.num_cells)
        for sequence, length in enumerate(self.lengths_S.tolist()):
            counts_C += self._up_to(sequence, length)
        return counts_C.reshape(self.num_layers, self.num_experts) / self.trace.num_tokens

    def of_tokens(self, sequences_n: IntArray, positions_n: IntArray) -> NDArray[np.int64]:
        """Counts of single tokens, each at a position of its request."""
        rows_n = self.starts_S1[sequences_n] + positions_n % self.lengths_S[sequences_n]
        return self._of_rows(rows_n)

    def of_span(self, sequence: int, first: int, num_tokens: int) -> NDArray[np.int64]:
        """Counts of `num_tokens` tokens from position `first` on."""
        length = int(self.lengths_S[sequence])
        if num_tokens <= 2 * self._block:
            return self._of_rows(self.starts_S1[sequence] + np.arange(first, first + num_tokens) % length)
        laps, begin, end = (first + num_tokens) // length - first // length, first % length, (first + num_tokens)
        counts = self._up_to(sequence, end % length) - self._up_to(sequence, begin)
        return counts + laps * self._up_to(sequence, length) if laps else counts

    def _up_to(self, sequence: int, num_rows: int) -> NDArray[np.int64]:
        block, rest = divmod(num_rows, self._block)
        counts: NDArray[np.int64] = self._before_BC[self._first_block_S[sequence] + block].astype(np.int64)
        if rest:
            end = int(self.starts_S1[sequence]) + num_rows
            counts += self._of_rows(slice(end - rest, end))
        return counts

    def _of_rows(self, rows: IntArray | slice[Any, Any, Any]) -> NDArray[np.int64]:
        cells = (self._experts_TLk[rows] + self._offsets_L1).reshape(-1)
        return np.bincount(cells, minlength=self.num_cells)

    def _prefixes(self) -> tuple[IntArray, IntArray]:
        """Number of each sequence's first block, and the counts of its rows before each block."""
        blocks_S = self.lengths_S // self._block + 1
        first_S = np.cumsum(blocks_S) - blocks_S
        before_BC = np.zeros((int(blocks_S.sum()), self.num_cells), dtype=np.uint32)
        for sequence in range(self.num_sequences):
            start, first = int(self.starts_S1[sequence]), int(first_S[sequence])
            for block in range(int(blocks_S[sequence]) - 1):
                rows = slice(start + block * self._block, start + (block + 1) * self._block)
                before_BC[first + block + 1] = before_BC[first + block] + self._of_rows(rows)
        return first_S, before_BC


def assign_sequences(num_requests: int, num_sequences: int, *, in_order: bool, seed: int) -> NDArray[np.int64]:
    """The recorded sequence that each request follows: drawn at random, or (for traces that drift) in their order."""
    if in_order:
        return np.arange(num_requests) * num_sequences // num_requests
    return np.random.default_rng(seed).integers(num_sequences, size=num_requests)
