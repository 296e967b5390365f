"""Names of numpy array types, one meaning each."""

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
UInt64Array = NDArray[np.uint64]
