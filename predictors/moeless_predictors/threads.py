"""One thread for numpy's BLAS: the products here are small, and threads that spin for more cost others their cores."""

from __future__ import annotations

from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController

_OPENBLAS = "openblas"
"""The library of numpy and scipy; torch's own is left alone."""


def one_blas_thread() -> AbstractContextManager[object]:
    """Within the block numpy computes with the calling thread alone; for the process, not only for this thread.

    On two cores, with another process on one of them, 32 forecasts took 40 times as long with two threads as with one.
    """
    limited: AbstractContextManager[object] = ThreadpoolController().select(internal_api=_OPENBLAS).limit(limits=1)
    return limited


def keep_to_one_blas_thread() -> None:
    """The same for the rest of the process's life: for a server that has its cores shared out."""
    for library in ThreadpoolController().select(internal_api=_OPENBLAS).lib_controllers:
        library.set_num_threads(1)
