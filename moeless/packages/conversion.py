"""Check a checkpoint against its model, then bring its tensors into memory one MoE layer at a time.

The conversion itself (hub names, per-expert tensors → stacked parameters) is transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.loading_report import LoadStateDictInfo

from moeless.core.errors import CheckpointError
from moeless.packages.checkpoint import torch_dtype
from moeless.packages.transformers_loader import TensorLoader

logger = logging.getLogger(__name__)


class CheckpointConverter:
    """The tensors of one checkpoint as its model has them in memory, read a part at a time.

    `model` is on the meta device and is back there after each part.
    """

    def __init__(self, model: PreTrainedModel, tensors: dict[str, Any], dtype: torch.dtype) -> None:
        self._model = model
        self._tensors = tensors
        self._dtype = dtype
        self._loader = TensorLoader(model, dtype, device="cpu", convert=True)
        self._groups = self._loader.group_by_target(list(tensors))

    def check(self) -> None:
        """Run the whole conversion on the meta device, which costs no memory.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or belongs to a layer that has no place for it.

        """
        on_meta = {
            name: torch.empty(tensor.get_shape(), dtype=torch_dtype(tensor), device="meta")
            for name, tensor in self._tensors.items()
        }
        info = TensorLoader(self._model, self._dtype, device="meta", convert=True).load(on_meta)
        self._raise_if_wrong(info)
        self._raise_if_missing(info)
        self._raise_if_unexpected(info)

    def load_module(self, name: str) -> dict[str, torch.Tensor]:
        """Stacked parameters of the experts module `name`, by parameter name."""
        prefix = f"{name}."
        loaded = self._load([target for target in self._groups if target.startswith(prefix)])
        return {target.removeprefix(prefix): tensor for target, tensor in loaded.items()}

    def load_rest(self, excluded: list[str], max_shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """Every tensor outside the modules `excluded`, in shards of about `max_shard_bytes`."""
        known = self._model.state_dict()
        prefixes = tuple(f"{name}." for name in excluded)
        shard: list[str] = []
        shard_bytes = 0
        for target in self._groups:
            if target not in known or target.startswith(prefixes):
                continue
            shard.append(target)
            shard_bytes += sum(_slice_bytes(self._tensors[source]) for source in self._groups[target])
            if shard_bytes >= max_shard_bytes:
                yield self._load(shard)
                shard, shard_bytes = [], 0
        if shard:
            yield self._load(shard)

    def _load(self, targets: list[str]) -> dict[str, torch.Tensor]:
        sources = [source for target in targets for source in self._groups[target]]
        self._raise_if_wrong(self._loader.load({source: self._tensors[source] for source in sources}))
        loaded: dict[str, torch.Tensor] = {}
        for name, tensor in list(self._model.state_dict(keep_vars=True).items()):
            if tensor.device.type != "meta":
                loaded[name] = tensor.detach()
                _put_on_meta(self._model, name)
        return loaded

    def _raise_if_wrong(self, info: LoadStateDictInfo) -> None:
        for name, found, expected in sorted(info.mismatched_keys):
            lacking = self._lacking_sources(name)
            if lacking:
                raise CheckpointError(f"the checkpoint lacks tensor {lacking[0]}{_and_more(lacking)}")
            raise CheckpointError(f"tensor {name} must have shape {tuple(expected)}, got {tuple(found)}")
        for name, message in sorted(info.conversion_errors.items()):
            lacking = self._lacking_sources(name)
            if lacking:
                raise CheckpointError(f"the checkpoint lacks tensor {lacking[0]}{_and_more(lacking)}")
            raise CheckpointError(f"tensor {name} cannot be converted: {message.strip().splitlines()[-1]}")

    def _raise_if_missing(self, info: LoadStateDictInfo) -> None:
        self._model._adjust_missing_and_unexpected_keys(info)
        missing = set(info.missing_keys)
        for target, source in self._model.all_tied_weights_keys.items():
            if not {target, source} <= missing:
                missing -= {target, source}
        if missing:
            lacking = [source for name in sorted(missing) for source in self._lacking_sources(name) or [name]]
            raise CheckpointError(f"the checkpoint lacks tensor {lacking[0]}{_and_more(lacking)}")

    def _raise_if_unexpected(self, info: LoadStateDictInfo) -> None:
        """Refuse a tensor inside a layer that the model has; let whole parts be that it has not (vision, MTP)."""
        modules = {name for name, _ in self._model.named_modules()}
        ignored = []
        for name in sorted(info.unexpected_keys):
            if any(part.isdigit() for part in _deepest_module(name, modules).split(".")):
                raise CheckpointError(
                    f"the checkpoint holds tensor {name}, for which {type(self._model).__name__} has no place"
                )
            ignored.append(name)
        if ignored:
            logger.warning(
                "ignored tensors=%d first=%s reason=not part of the language model", len(ignored), ignored[0]
            )

    def _lacking_sources(self, target: str) -> list[str]:
        """Names in hub format that `target` is made of and the checkpoint has not; empty if it is in another format."""
        expected = revert_weight_conversion(self._model, {target: self._model.state_dict()[target]})
        sources = self._groups.get(target, [])
        if sources and not expected.keys() & set(sources):
            return []
        return [name for name in expected if name not in self._tensors]


def _put_on_meta(model: nn.Module, name: str) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor = getattr(module, attribute)
    on_meta = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        on_meta = nn.Parameter(on_meta, requires_grad=tensor.requires_grad)
    setattr(module, attribute, on_meta)


def _deepest_module(name: str, modules: set[str]) -> str:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in modules:
            return ".".join(parts[:end])
    return ""


def _slice_bytes(tensor: Any) -> int:
    count = 1
    for size in tensor.get_shape():
        count *= size
    return count * torch_dtype(tensor).itemsize


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
