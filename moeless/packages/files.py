"""Files whose bytes must be whole and known: written with fsync and a checksum, read against one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

ProgressCallback = Callable[[int, int, str], None]
"""(packages done, packages in all, name of the one just written)."""


def write_durably(path: Path, data: bytes) -> str:
    """Write `data` to a new file and flush it to the disk. Returns its sha256."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lies_inside(folder: Path, file: Path) -> bool:
    """Return whether `file`, its links followed, is in `folder` or below it."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
