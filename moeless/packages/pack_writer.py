"""Write the files of a packed folder: functions, backbone, and the manifest last. Called by pack.pack_checkpoint.

Memory: one MoE layer's experts, or one backbone shard, at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moeless.core.errors import CheckpointError
from moeless.core.expert import FunctionId
from moeless.packages.checkpoint import Checkpoint, in_one_line, weights_dtype
from moeless.packages.conversion import CheckpointConverter
from moeless.packages.files import ProgressCallback, sync_folder, write_durably
from moeless.packages.inspection.companions import COMPANION_FILES
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
)
from moeless.packages.tensor_files import dtype_name, encode_tensors
from moeless.packages.transformers_loader import build_on_meta


@dataclass
class PackWriter:
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
            model = _build(checkpoint, dtype)
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
                for name, tensor in weights.items():
                    _check_finite(f"{layer.module}.{names[name]}[{expert}]", tensor)
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
            for name, tensor in shard.items():
                _check_finite(name, tensor)
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


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return build_on_meta(checkpoint.model_class, checkpoint.config, dtype)
    except Exception as error:  # a family's model class may raise anything on values that its config class takes
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: {checkpoint.model_class.__name__} cannot be built with it: "
            f"{in_one_line(error)}"
        ) from error


def _describe_layer(index: int, name: str, module: ExpertsModule, family: str) -> LayerEntry:
    return LayerEntry(
        layer=index,
        module=name,
        num_experts=module.down_proj.shape[0],
        top_k=top_k_of(module, family),
        layout=describe_experts(module, family),
    )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError at the first value that is NaN or infinite: the model would answer nonsense."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return
    first = [int(index) for index in (~torch.isfinite(tensor)).nonzero()[0]]
    raise CheckpointError(f"tensor {name} must be finite, holds {tensor[tuple(first)].item()} at {first}")
