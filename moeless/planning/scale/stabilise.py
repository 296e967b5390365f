"""Counts that do not flap: replicas are added or taken away once that was wanted for a while.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import FloatArray, IntArray

_PARTS = 16
"""Number of parts in which a window is remembered at most: the memory for it is bounded."""


class Stabiliser:
    """Remembers recommended counts, as Kubernetes' horizontal pod autoscaler does.

    The count rises to the lowest recommendation of the up window where it is below that, and falls to the highest of
    the down window where it is above that. An instance takes `ready_s` to start, for the load of the next
    `window_s`. Where it would be ready only after that, the up window is longer by the difference: only a forecast that
    lasts starts it.
    """

    def __init__(
        self, *, up_window_s_LE: FloatArray, down_window_s_LE: FloatArray, ready_s: float, window_s: float
    ) -> None:
        self._up = _Window(up_window_s_LE + max(0.0, ready_s - window_s))
        self._down = _Window(down_window_s_LE)

    def stabilise(self, wanted_LE: IntArray, *, time_s: float, current_LE: IntArray | None) -> IntArray:
        """Remember what is wanted and return what to have, given what there is (None: nothing yet).

        The same call again, with what it returned, returns the same. Times must not fall from call to call.
        """
        if current_LE is None:
            self._up.forget()
            self._down.forget()
            current_LE = wanted_LE
        elif self._up.is_empty:
            # What was there before anything was remembered had its reasons.
            self._up.remember(current_LE, time_s)
            self._down.remember(current_LE, time_s)
        self._up.remember(wanted_LE, time_s)
        self._down.remember(wanted_LE, time_s)
        stable_LE: IntArray = np.clip(
            current_LE, self._up.lowest_LE(wanted_LE, time_s), self._down.highest_LE(wanted_LE, time_s)
        )
        return stable_LE


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    index: int
    first_s: float
    last_s: float
    lowest_LE: IntArray
    highest_LE: IntArray


class _Window:
    """The last recommendations, in parts.

    Rising looks back to where a part begins and falling to where it ends, so that a function whose window is short
    among long ones neither waits for nor is held by more than its own, but for a part of the longest.
    """

    def __init__(self, window_s_LE: FloatArray) -> None:
        self._window_s_LE = window_s_LE
        self._longest_s = float(window_s_LE.max(initial=0.0))
        self._parts: deque[_Part] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def forget(self) -> None:
        self._parts.clear()

    def remember(self, counts_LE: IntArray, time_s: float) -> None:
        while len(self._parts) > 1 and time_s - self._parts[0].last_s >= self._longest_s:
            self._parts.popleft()
        index = int(time_s * _PARTS // self._longest_s) if self._longest_s > 0 else 0
        part = _Part(index, time_s, time_s, counts_LE, counts_LE)
        if self._parts and self._parts[-1].index == index and self._longest_s > 0:
            last = self._parts.pop()
            part = _Part(
                index,
                last.first_s,
                time_s,
                np.minimum(last.lowest_LE, counts_LE),
                np.maximum(last.highest_LE, counts_LE),
            )
        self._parts.append(part)

    def lowest_LE(self, wanted_LE: IntArray, time_s: float) -> IntArray:
        lowest_LE = wanted_LE.copy()
        for part in self._parts:
            np.minimum(lowest_LE, part.lowest_LE, out=lowest_LE, where=time_s - part.first_s < self._window_s_LE)
        return lowest_LE

    def highest_LE(self, wanted_LE: IntArray, time_s: float) -> IntArray:
        highest_LE = wanted_LE.copy()
        for part in self._parts:
            np.maximum(highest_LE, part.highest_LE, out=highest_LE, where=time_s - part.last_s < self._window_s_LE)
        return highest_LE
