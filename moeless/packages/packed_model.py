"""A packed folder, read one function at a time, by memory map."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moeless.core.errors import ChecksumError, PackageError
from moeless.core.expert import ExpertLayout, FunctionId
from moeless.packages.files import lies_inside, sha256_of
from moeless.packages.manifest import BACKBONE_DIR, FileEntry, FunctionEntry, Manifest, read_manifest
from moeless.packages.weights import FunctionWeights


class PackedModel:
    """The backbone and functions of one model on disk. Safe to use from several threads."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._entries = {FunctionId(entry.layer, entry.expert): entry for entry in manifest.functions}
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> PackedModel:
        """Read the manifest of the packed folder `path`.

        Raises:
            PackageError: no manifest, a bad one, or one that names a file that is not there or outside of the folder.

        """
        path = Path(path).expanduser().absolute()
        manifest = read_manifest(path)
        for file in manifest.files:
            if not (path / file).is_file():
                raise PackageError(f"packed model {path} lacks {file}; delete the folder and pack the checkpoint again")
            if not lies_inside(path, path / file):
                raise PackageError(
                    f"packed model {path}: {file} must lie inside the folder, but a link leads out of it"
                )
        return cls(path, manifest)

    @property
    def backbone_path(self) -> Path:
        """A model folder of transformers: config, tokenizer, chat template, and the backbone's weights."""
        return self.path / BACKBONE_DIR

    @property
    def functions(self) -> list[FunctionId]:
        """Every function, by layer and expert."""
        return list(self._entries)

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of the experts of MoE layer `layer`. Raises PackageError if there is no such layer."""
        if not 0 <= layer < self.manifest.num_moe_layers:
            raise PackageError(f"layer must be from 0 to {self.manifest.num_moe_layers - 1}, got {layer}")
        return self.manifest.layers[layer].layout

    def function_bytes(self, function: FunctionId) -> int:
        """Bytes of the function's weights in the checkpoint's own dtype."""
        return self._entry(function).bytes

    def read_function(
        self, function: FunctionId, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> FunctionWeights:
        """Read one function's weights.

        On the CPU in the checkpoint's own dtype the tensors are a private memory map of the package: nothing is
        copied, and pages are read when touched. The first read of a function in this process checks the
        file's checksum.

        Raises:
            ChecksumError: the package is not what the manifest promises; names the function.
            PackageError: no such function, or its package cannot be read.

        """
        entry = self._entry(function)
        self._verify(entry.name, entry)
        try:
            with safe_open(self.path / entry.file, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name).to(device=device, dtype=dtype) for name in entry.tensors}
        except (SafetensorError, OSError) as error:
            raise PackageError(f"function {function}: {entry.file} cannot be read ({error})") from error
        return FunctionWeights(**tensors)

    def verify_backbone_file(self, name: str) -> None:
        """Check a file of the backbone, such as config.json, before it is read.

        Raises:
            ChecksumError: it is not what the manifest promises; names the file.
            PackageError: the backbone has no such file.

        """
        file = f"{BACKBONE_DIR}/{name}"
        entry = next((entry for entry in self.manifest.backbone if entry.file == file), None)
        if entry is None:
            raise PackageError(
                f"packed model {self.path} has no {file}; delete the folder and pack the checkpoint again"
            )
        self._verify(entry.file, entry)

    def verify_backbone(self) -> None:
        """Check every file of the backbone: weights, config, tokenizer. Each is read once in the life of this object.

        Raises:
            ChecksumError: a file of the backbone is not what the manifest promises; names the file.

        """
        for entry in self.manifest.backbone:
            self._verify(entry.file, entry)

    def backbone_weight_files(self) -> list[Path]:
        """The backbone's safetensors files, once `verify_backbone` found them whole."""
        self.verify_backbone()
        return [self.path / entry.file for entry in self.manifest.backbone if entry.file.endswith(".safetensors")]

    def _entry(self, function: FunctionId) -> FunctionEntry:
        entry = self._entries.get(function)
        if entry is None:
            raise PackageError(f"packed model {self.path} has no function {function}")
        return entry

    def _verify(self, name: str, entry: FunctionEntry | FileEntry) -> None:
        with self._lock:
            if name in self._verified:
                return
        try:
            found = sha256_of(self.path / entry.file)
        except OSError as error:
            raise PackageError(f"{name}: {entry.file} cannot be read ({error.strerror})") from error
        if found != entry.sha256:
            raise ChecksumError(
                f"{name}: sha256 of {self.path / entry.file} must be {entry.sha256}, got {found}; "
                "the file is damaged, delete the folder and pack the checkpoint again"
            )
        with self._lock:
            self._verified.add(name)
