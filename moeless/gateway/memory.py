"""Has the C library give the memory of large bodies back to the system. Called by GatewayService."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
"""Constant of glibc's malloc.h."""
_THRESHOLD_BYTES = 256 * 1024


def return_large_blocks() -> bool:
    """Let this process's large blocks be mapped one by one, and unmapped when they are freed.

    By itself glibc raises its threshold for this with every large block that is freed, up to 32 MB, and blocks below it
    come from heaps that shrink only from their end. Returns False where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
