"""NPZ files of others, read array by array, without pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.lib.npyio import NpzFile

from moeless_predictors.arrays import AnyArray
from moeless_predictors.traces.container import TraceFormatError


class NpzArrays:
    """The arrays of an open file; each is read, and checked by zip's checksum, on demand."""

    def __init__(self, path: Path, npz: NpzFile) -> None:
        self._path = path
        self._npz = npz
        self.names = frozenset(npz.files)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open a file. Raises TraceFormatError if it is no whole NPZ."""
        with path.open("rb") as file:
            try:
                npz = np.load(file, allow_pickle=False)
            except (zipfile.BadZipFile, ValueError, EOFError) as error:
                raise TraceFormatError(f"{path}: damaged or truncated NPZ: {error}") from error
            with npz:
                yield cls(path, npz)

    def read(self, name: str) -> AnyArray:
        """One array. Raises TraceFormatError if it is damaged, or needs pickle, which is never used."""
        try:
            array: AnyArray = self._npz[name]
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise TraceFormatError(f"{self._path}: array {name!r} cannot be read: {error}") from error
        return array

    def first_of(self, *names: str) -> str | None:
        """Return the one of these names that the file has, or None. Raises TraceFormatError for more than one."""
        found = [name for name in names if name in self.names]
        if len(found) > 1:
            raise TraceFormatError(f"{self._path}: must have only one of the arrays {', '.join(found)}")
        return found[0] if found else None
