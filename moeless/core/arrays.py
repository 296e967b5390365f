"""Names of numpy array types, one meaning each. The letters after an array's name are its shape, as each file's legend
says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.integer[Any]]
"""Integers of any width."""
FloatArray = NDArray[np.floating[Any]]
"""Floating-point numbers of any width."""
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]


def read_only(array: AnyArray) -> None:
    """Refuse writes to the array from now on, by whoever holds it."""
    array.setflags(write=False)
