"""Loops that are compiled: numba's decorator, with the types that mypy needs.

Some things have to be done between two layers of a step, or for every layer of a model within a tick, and go over
short arrays one element after the other: looking a token up in its sequence's past, filling workers, searching for
moves. As numpy calls most of their time is that of the calls. moeless.planning uses this, too.

Compiled code is kept beside the source or, where that cannot be written to, in the user's cache folder (numba's
NUMBA_CACHE_DIR); where neither can be, it is compiled at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Compiled = TypeVar("Compiled", bound=Callable[..., Any])


def compiled(function: Compiled) -> Compiled:
    """The function as machine code. It may use numbers, arrays and other compiled functions; division by zero gives inf
    as in numpy."""
    try:
        return cast(Compiled, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder that numba may write to
        return cast(Compiled, numba.njit(error_model="numpy")(function))
