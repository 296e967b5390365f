"""Write a packed folder: the backbone, one package per routed expert, and the manifest last.

Called by `moeless pack` and by source.resolve_model. Memory: one MoE layer's experts, or one backbone shard, at a
time. Everything goes into a sibling folder that is renamed at the end, so a folder under its final name is whole.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from moeless.core.errors import PackageError
from moeless.core.expert import FunctionId
from moeless.packages.cache import fingerprint, lock_path
from moeless.packages.checkpoint import COMPANION_FILES, Checkpoint, open_checkpoint, weights_dtype
from moeless.packages.conversion import CheckpointConverter
from moeless.packages.files import dtype_name, encode_tensors, sync_folder, write_durably
from moeless.packages.layout import ExpertsModule, describe_experts, parameter_names, require_experts, top_k_of
from moeless.packages.manifest import (
    BACKBONE_DIR,
    FUNCTIONS_DIR,
    MANIFEST_NAME,
    FileEntry,
    FunctionEntry,
    LayerEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
    read_manifest,
)
from moeless.packages.transformers_loader import build_on_meta

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[int, int, str], None]
"""(packages done, packages in all, name of the one just written)."""

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
    checkpoint = open_checkpoint(source)
    source_fingerprint = fingerprint(source)
    try:
        with _exclusive(out), _partial_folder(out) as partial:
            existing = _existing_pack(out, source_fingerprint)
            if existing is not None:
                return existing
            writer = _PackWriter(partial, checkpoint, on_progress or _ignore_progress)
            manifest = writer.write(model_id or source.name, source_fingerprint, max_shard_bytes)
            os.replace(partial, out)
            sync_folder(out.parent)
    except OSError as error:
        raise PackageError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
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


@dataclass
class _PackWriter:
    folder: Path
    checkpoint: Checkpoint
    on_progress: ProgressCallback
    total: int = 0
    done: int = 0
    functions: list[FunctionEntry] = field(default_factory=list)

    def write(self, model_id: str, source_fingerprint: str, max_shard_bytes: int) -> Manifest:
        checkpoint = self.checkpoint
        with checkpoint.open_tensors() as tensors, torch.no_grad():
            dtype = weights_dtype(checkpoint.config, tensors)
            model = build_on_meta(checkpoint.model_class, checkpoint.config, dtype)
            modules = require_experts(model)
            layers = [
                _describe_layer(index, name, module, checkpoint.config.model_type)
                for index, (name, module) in enumerate(modules.items())
            ]
            converter = CheckpointConverter(model, tensors, dtype)
            converter.check()
            self.total = sum(layer.num_experts for layer in layers) + 1
            self._write_functions(converter, layers)
            backbone = self._write_backbone(converter, list(modules), max_shard_bytes)
        manifest = Manifest(
            model_id=model_id,
            model_type=checkpoint.config.model_type,
            architecture=checkpoint.model_class.__name__,
            dtype=dtype_name(dtype),
            source_fingerprint=source_fingerprint,
            num_moe_layers=len(layers),
            num_experts=max(layer.num_experts for layer in layers),
            top_k=max(layer.top_k for layer in layers),
            layers=layers,
            functions=self.functions,
            backbone=backbone,
        )
        for folder in (self.folder / FUNCTIONS_DIR, self.folder / BACKBONE_DIR):
            sync_folder(folder)
        write_durably(self.folder / MANIFEST_NAME, encode_manifest(manifest))
        sync_folder(self.folder)
        return manifest

    def _write_functions(self, converter: CheckpointConverter, layers: list[LayerEntry]) -> None:
        (self.folder / FUNCTIONS_DIR).mkdir()
        for layer in layers:
            stacked = converter.load_module(layer.module)
            names = parameter_names(layer.layout)
            for expert in range(layer.num_experts):
                weights = {name: stacked[parameter][expert] for name, parameter in names.items()}
                self.functions.append(self._write_function(FunctionId(layer.layer, expert), weights))
                self._report(self.functions[-1].name)

    def _write_function(self, function: FunctionId, weights: Mapping[str, torch.Tensor]) -> FunctionEntry:
        file = f"{FUNCTIONS_DIR}/{function}.safetensors"
        return FunctionEntry(
            name=str(function),
            layer=function.layer,
            expert=function.expert,
            file=file,
            tensors={
                name: TensorEntry(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
                for name, tensor in weights.items()
            },
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
            sha256=write_durably(self.folder / file, encode_tensors(weights)),
        )

    def _write_backbone(
        self, converter: CheckpointConverter, experts: list[str], max_shard_bytes: int
    ) -> list[FileEntry]:
        (self.folder / BACKBONE_DIR).mkdir()
        entries = []
        for index, shard in enumerate(converter.load_rest(experts, max_shard_bytes), start=1):
            entries.append(self._write_backbone_file(f"backbone-{index:05d}.safetensors", encode_tensors(shard)))
        for name in ("config.json", *COMPANION_FILES):
            file = self.checkpoint.path / name
            if file.is_file():
                entries.append(self._write_backbone_file(name, file.read_bytes()))
        self._report(BACKBONE_DIR)
        return entries

    def _write_backbone_file(self, name: str, data: bytes) -> FileEntry:
        file = f"{BACKBONE_DIR}/{name}"
        return FileEntry(file=file, bytes=len(data), sha256=write_durably(self.folder / file, data))

    def _report(self, label: str) -> None:
        self.done += 1
        self.on_progress(self.done, self.total, label)


def _describe_layer(index: int, name: str, module: ExpertsModule, family: str) -> LayerEntry:
    return LayerEntry(
        layer=index,
        module=name,
        num_experts=module.down_proj.shape[0],
        top_k=top_k_of(module, family),
        layout=describe_experts(module, family),
    )


def _ignore_progress(done: int, total: int, label: str) -> None:
    """The default `on_progress`."""
