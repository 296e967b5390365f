"""Build the transformers model of a packed folder without the weights of its experts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from moeless.core.errors import PackageError
from moeless.packages.layout import experts_modules, named_experts_modules
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_of_name
from moeless.packages.transformers_loader import TensorLoader, build_on_meta, causal_lm_class

__all__ = ["EXPERTS_IMPLEMENTATION", "experts_modules", "load_backbone"]

EXPERTS_IMPLEMENTATION = "moeless"
"""Key in transformers' ALL_EXPERTS_FUNCTIONS that the engine registers itself under."""


def load_backbone(
    packed: PackedModel, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model in eval mode, its experts' parameters on the meta device, where they have been from the start.

    Each experts module has the attribute `moeless_layer` and the experts implementation `moeless`, which must be
    registered before the model is called. `dtype` is the checkpoint's own by default; what the family keeps in
    float32 stays so.

    Raises:
        ChecksumError: a file of the backbone is damaged.
        PackageError: the backbone does not hold what its class needs.

    """
    manifest = packed.manifest
    files = packed.backbone_weight_files()
    dtype = dtype or dtype_of_name(manifest.dtype)
    model = _build(packed, dtype)
    modules = named_experts_modules(model)
    if list(modules) != [layer.module for layer in manifest.layers]:
        raise PackageError(f"{packed.path}: {manifest.architecture} has other experts modules than the manifest")
    _load_weights(model, files, dtype, device, set(modules))
    for index, module in enumerate(modules.values()):
        module.moeless_layer = index
        module.config._experts_implementation = EXPERTS_IMPLEMENTATION
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
    if model.can_generate() and (packed.backbone_path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(packed.backbone_path)
    return model


def _build(packed: PackedModel, dtype: torch.dtype) -> PreTrainedModel:
    model_class, config = causal_lm_class(
        AutoConfig.from_pretrained(packed.backbone_path, local_files_only=True, trust_remote_code=False)
    )
    if model_class.__name__ != packed.manifest.architecture:
        raise PackageError(
            f"{packed.path}: architecture must be {packed.manifest.architecture}, got {model_class.__name__}; "
            "pack the checkpoint again with this version of transformers"
        )
    config.dtype = dtype
    config.name_or_path = str(packed.backbone_path)
    return build_on_meta(model_class, config, dtype)


def _load_weights(
    model: PreTrainedModel, files: list[Path], dtype: torch.dtype, device: torch.device | str, experts: set[str]
) -> None:
    loader = TensorLoader(model, dtype, device=device, convert=False)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt", device="cpu")) for file in files]
        tensors: dict[str, Any] = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
        info = loader.load(tensors)
    if info.unexpected_keys or info.mismatched_keys:
        wrong = sorted([*info.unexpected_keys, *(name for name, *_ in info.mismatched_keys)])
        raise PackageError(f"backbone tensor {wrong[0]} does not fit {type(model).__name__}")
    # Finalizing would allocate and initialize what is missing; the experts are not missing but elsewhere.
    for name in experts:
        _mark_initialized(model.get_submodule(name))
    info.missing_keys = {name for name in info.missing_keys if name.rpartition(".")[0] not in experts}
    info = loader.finalize(info)
    if info.missing_keys:
        raise PackageError(f"the backbone lacks tensor {sorted(info.missing_keys)[0]}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and name.rpartition(".")[0] not in experts:
            raise PackageError(f"backbone tensor {name} was not loaded")


def _mark_initialized(module: nn.Module) -> None:
    """Keep transformers' weight initialization away from `module`."""
    for marked in (module, *module.parameters()):
        marked.__dict__["_is_hf_initialized"] = True
