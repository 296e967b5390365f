"""The manifest of a packed model: what each file holds and the checksum it must have.

A packed folder is `manifest.json`, `backbone/` (a model folder of transformers without the experts' weights) and
`functions/L07.E003.safetensors`, ... The manifest is written last: a folder without one is not a packed model.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import msgspec

from moeless.core.errors import PackageError
from moeless.core.expert import ExpertLayout, FunctionId

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
BACKBONE_DIR = "backbone"
FUNCTIONS_DIR = "functions"
MAX_MANIFEST_BYTES = 256 << 20
"""61 layers of 256 experts take 8 MB."""


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and dtype ("bfloat16") of one tensor of a package."""

    shape: tuple[int, ...]
    dtype: str


class FunctionEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One function package."""

    name: str
    layer: int
    expert: int
    file: str
    """Relative to the packed folder, with forward slashes."""
    tensors: dict[str, TensorEntry]
    bytes: int
    """Size of the tensors, which an instance holds. The file is larger by its header."""
    sha256: str
    """Checksum of the file."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the backbone."""

    file: str
    bytes: int
    sha256: str


class LayerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One MoE layer."""

    layer: int
    """Counts MoE layers from 0; dense layers between them are not counted."""
    module: str
    """Dotted name of the experts module in the transformers model."""
    num_experts: int
    top_k: int
    layout: ExpertLayout


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of a packed model without opening its tensors."""

    format_version: int = FORMAT_VERSION
    model_id: str
    model_type: str
    architecture: str
    """Name of the transformers class that the backbone is."""
    dtype: str
    """The checkpoint's own, such as "bfloat16"."""
    source_fingerprint: str
    """Fingerprint of the checkpoint's files (source.fingerprint), which identifies the checkpoint of a pack."""
    num_moe_layers: int
    num_experts: int
    """Routed experts per MoE layer; the most where layers differ (LayerEntry has each)."""
    top_k: int
    """Experts per token; the most where layers differ."""
    layers: list[LayerEntry]
    functions: list[FunctionEntry]
    backbone: list[FileEntry]

    @property
    def files(self) -> list[str]:
        """Every file of the packed folder but the manifest itself."""
        return [entry.file for entry in self.functions] + [entry.file for entry in self.backbone]

    @property
    def function_bytes(self) -> int:
        """Bytes of all experts' weights."""
        return sum(entry.bytes for entry in self.functions)


def encode_manifest(manifest: Manifest) -> bytes:
    """The JSON text of `manifest.json`."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        PackageError: no manifest, another format version, or one that contradicts itself.

    """
    path = folder / MANIFEST_NAME
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise PackageError(f"{path}: must have at most {MAX_MANIFEST_BYTES} bytes, has {size}")
        data = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}); is this a packed model?") from error
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise PackageError(
                f"{path}: format_version must be {FORMAT_VERSION}, got {version}; pack the checkpoint again"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise PackageError(f"{path}: not a manifest ({error})") from error
    _check_consistency(manifest, path)
    return manifest


class _Version(msgspec.Struct):
    format_version: int


def _check_consistency(manifest: Manifest, path: Path) -> None:
    if [entry.layer for entry in manifest.layers] != list(range(manifest.num_moe_layers)):
        raise PackageError(f"{path}: layers must count from 0 to {manifest.num_moe_layers - 1}")
    expected = [FunctionId(layer.layer, expert) for layer in manifest.layers for expert in range(layer.num_experts)]
    if [FunctionId(entry.layer, entry.expert) for entry in manifest.functions] != expected:
        raise PackageError(f"{path}: functions must list every expert of every layer once, in order")
    for entry in manifest.functions:
        if entry.name != str(FunctionId(entry.layer, entry.expert)):
            raise PackageError(f"{path}: {entry.name!r} is not the name of layer {entry.layer}, expert {entry.expert}")
    for file in manifest.files:
        relative = PurePosixPath(file)
        if relative.is_absolute() or ".." in relative.parts or "\0" in file:
            raise PackageError(f"{path}: file must lie inside the packed folder, got {file!r}")
