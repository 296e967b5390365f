"""Random numbers that depend on a request's seed and a token's position alone.

Splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a
counter-based generator: the n-th number of a stream is computed without the ones before it, so a sequence draws the
same numbers whatever else is in its batch and after it was preempted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stream_of(seed: int) -> int:
    """The stream (64 bits) of a seed of any size and sign; neighbouring seeds get unrelated streams."""
    z = (seed + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniforms(streams: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair of stream and position, 52 bits each."""
    z = streams + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    bits: NDArray[np.float64] = (z >> np.uint64(12)).astype(np.float64)
    return bits * 2.0**-52
