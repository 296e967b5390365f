"""The load that was seen, kept for planners that look back.

Fed by the simulator step by step, and by control from the engines' counters.

Shapes: C cells (functions, layer by layer).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError

_PARTS_PER_WINDOW = 10


@dataclass(slots=True)
class _Part:
    begin_s: float
    sum_C: FloatArray
    square_C: FloatArray
    num_steps: int = 0
    pairs: float = 0.0
    square_pairs: float = 0.0


@dataclass(frozen=True, slots=True)
class WindowLoad:
    """Tokens per step of a window; zero where it had no steps."""

    mean_C: FloatArray
    dispersion_C: FloatArray
    """Variance over mean of a step's tokens, at least 1 (that of counts that come independently)."""
    num_steps: int = field(default=0)
    burst: float = field(default=1.0)
    """Token-weighted mean of a step's tokens over their plain mean, at least 1: rare prefill steps have most."""


class LoadHistory:
    """Loads of the last seconds or steps, in tenths of the window.

    Args:
        window_s, window_steps: the window; one of the two.
    """

    def __init__(self, num_cells: int, *, window_s: float | None = None, window_steps: int | None = None) -> None:
        if (window_s is None) == (window_steps is None):
            raise ConfigError(f"window must be given in seconds or in steps, got {window_s} and {window_steps}")
        if not (window_s or window_steps or 0) > 0:
            raise ConfigError(f"window must be above 0, got {window_steps if window_s is None else window_s}")
        self._window_s, self._window_steps = window_s, window_steps
        self._num_cells = num_cells
        self._parts: deque[_Part] = deque()
        self.last_used_s_C = np.full(num_cells, -np.inf)
        self.total_C = np.zeros(num_cells)
        """Tokens since the start."""
        self.num_steps = 0

    def add(self, counts_C: IntArray, now_s: float) -> None:
        """Note a step's tokens."""
        part = self._part(now_s)
        part.sum_C += counts_C
        part.square_C += counts_C.astype(np.float64) ** 2
        part.num_steps += 1
        pairs = float(counts_C.sum())
        part.pairs += pairs
        part.square_pairs += pairs**2
        self.total_C += counts_C
        self.num_steps += 1
        self.last_used_s_C[counts_C > 0] = now_s

    def window(self, now_s: float) -> WindowLoad:
        """The load of the last window."""
        self._drop_old(now_s)
        num_steps = sum(part.num_steps for part in self._parts)
        if not num_steps:
            return WindowLoad(np.zeros(self._num_cells), np.ones(self._num_cells))
        mean_C = np.sum([part.sum_C for part in self._parts], axis=0) / num_steps
        variance_C = np.sum([part.square_C for part in self._parts], axis=0) / num_steps - mean_C**2
        dispersion_C = np.maximum(1.0, np.divide(variance_C, mean_C, out=np.ones_like(mean_C), where=mean_C > 0))
        pairs = sum(part.pairs for part in self._parts)
        square_pairs = sum(part.square_pairs for part in self._parts)
        return WindowLoad(mean_C, dispersion_C, num_steps, square_pairs * num_steps / pairs**2 if pairs else 1.0)

    def _part(self, now_s: float) -> _Part:
        last = self._parts[-1] if self._parts else None
        if self._window_s is not None:
            is_full = last is None or now_s - last.begin_s >= self._window_s / _PARTS_PER_WINDOW
        else:
            assert self._window_steps is not None
            is_full = last is None or last.num_steps >= max(1, self._window_steps // _PARTS_PER_WINDOW)
        if is_full:
            self._drop_old(now_s)
            last = _Part(now_s, np.zeros(self._num_cells), np.zeros(self._num_cells))
            self._parts.append(last)
        assert last is not None
        return last

    def _drop_old(self, now_s: float) -> None:
        if self._window_s is not None:
            while self._parts and self._parts[0].begin_s < now_s - self._window_s:
                self._parts.popleft()
            return
        assert self._window_steps is not None
        kept = sum(part.num_steps for part in self._parts)
        while self._parts and kept - self._parts[0].num_steps >= self._window_steps:
            kept -= self._parts.popleft().num_steps
