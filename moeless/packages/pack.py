"""Make a packed folder of a checkpoint: the backbone, one package per routed expert, and the manifest.

Called by `moeless pack` and by source.resolve_model. Everything goes into a sibling folder that is renamed at the end,
so a folder under its final name is whole. torch is imported only once the checkpoint has passed its inspection.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moeless.core.errors import PackageError
from moeless.packages.cache import fingerprint, lock_path
from moeless.packages.files import ProgressCallback, sync_folder
from moeless.packages.inspection import inspect_checkpoint
from moeless.packages.manifest import MANIFEST_NAME, Manifest, read_manifest

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 1 << 30
"""Backbone files of about 1 GiB: small enough to hold one in memory, large enough to be few."""


def pack_checkpoint(
    source: Path,
    out: Path,
    *,
    on_progress: ProgressCallback | None = None,
    model_id: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Split the checkpoint `source` into backbone and expert functions under `out`.

    Returns at once if `out` is a pack of this very checkpoint already. `model_id` is the name that the model is
    served under; the name of the source's folder by default.

    Raises:
        CheckpointError: the checkpoint cannot be packed, or is already packed elsewhere under `out`.
        PackageError: `out` holds something else, or cannot be written.

    """
    source, out = source.expanduser().resolve(), out.expanduser().resolve()
    files = inspect_checkpoint(source)
    source_fingerprint = fingerprint(source)
    try:
        with _exclusive(out), _partial_folder(out) as partial:
            existing = _existing_pack(out, source_fingerprint)
            if existing is not None:
                return existing
            from moeless.packages.checkpoint import open_checkpoint
            from moeless.packages.pack_writer import PackWriter

            writer = PackWriter(partial, open_checkpoint(source, files), on_progress or _ignore_progress)
            manifest = writer.write(model_id or source.name, source_fingerprint, max_shard_bytes)
            os.replace(partial, out)
            sync_folder(out.parent)
    except OSError as error:
        file = Path(error.filename or out)
        verb = "read" if file.is_relative_to(source) else "written"
        raise PackageError(f"{file}: cannot be {verb} ({error.strerror})") from error
    return manifest


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Let one process at a time write `out`; whoever comes second finds it packed."""
    lock = FileLock(lock_path(out))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that packs out=%s", out)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, without what a killed run left in it; removed unless it was renamed."""
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _existing_pack(out: Path, source_fingerprint: str) -> Manifest | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise PackageError(f"{out} exists and is not a packed model; choose another folder")
    manifest = read_manifest(out)
    if manifest.source_fingerprint != source_fingerprint:
        raise PackageError(f"{out} is a pack of another checkpoint ({manifest.model_id}); choose another folder")
    return manifest


def _ignore_progress(*_: object) -> None:
    """The default `on_progress`."""
