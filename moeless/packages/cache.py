"""Cache of packed models: its folder and its keys."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

from moeless.core.errors import CheckpointError
from moeless.packages.manifest import FORMAT_VERSION

_SAMPLE_BYTES = 65536
_NAME_LENGTH = 16


def cache_dir() -> Path:
    """`$MOELESS_CACHE`, else `moeless` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    configured = os.environ.get("MOELESS_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeless"


def packed_dir(source: Path) -> Path:
    """Return the folder for the pack of the checkpoint `source`.

    It changes with the versions that a pack depends on: its format, and transformers' names of the parameters.
    """
    key = f"{fingerprint(source)} {FORMAT_VERSION} {version('transformers')}"
    return cache_dir() / "packed" / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:_NAME_LENGTH]}"


def lock_path(out: Path) -> Path:
    """The lock that whoever writes `out` holds. In the cache, so that nothing is left beside `out`."""
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:_NAME_LENGTH]}.lock"


def fingerprint(checkpoint: Path) -> str:
    """Tells one state of a checkpoint from any other: path, names, sizes, times and a sample of each file's bytes.

    Reading everything would take as long as packing. Raises CheckpointError if a file cannot be read.
    """
    digest = hashlib.sha256(os.fsencode(checkpoint.resolve()))
    try:
        for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
            stat = file.stat()
            digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            with file.open("rb") as opened:
                for offset in (0, stat.st_size // 2, stat.st_size - _SAMPLE_BYTES):
                    opened.seek(max(0, offset))
                    digest.update(opened.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
