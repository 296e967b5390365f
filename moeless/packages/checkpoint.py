"""A sound checkpoint folder in Hugging Face format: its config, model class and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from moeless.core.errors import CheckpointError
from moeless.packages.transformers_loader import causal_lm_class

_MAX_REASON = 300
"""Characters of another library's error."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that passed all checks but those of its tensors' values."""

    path: Path
    config: PreTrainedConfig
    """Config of the causal language model: the text part of a multimodal config where the class needs that."""
    model_class: type[PreTrainedModel]
    files: tuple[Path, ...]
    """The safetensors files."""

    @contextmanager
    def open_tensors(self) -> Iterator[dict[str, Any]]:
        """Name → lazy slice of the mapped file (`[...]` reads it), valid inside the context."""
        with ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for file in self.files:
                try:
                    opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
                tensors.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
            yield tensors


def open_checkpoint(path: Path, files: tuple[Path, ...]) -> Checkpoint:
    """Find the config and model class of a folder that `inspection.inspect_checkpoint` found sound.

    Raises:
        CheckpointError: its family does not accept the config.
        UnsupportedFamilyError: transformers has no causal language model of this type.

    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a family's config class may raise anything on bad values
        raise CheckpointError(f"{path / 'config.json'}: {in_one_line(error)}") from error
    model_class, config = causal_lm_class(config)
    return Checkpoint(path=path, config=config, model_class=model_class, files=files)


def weights_dtype(config: PreTrainedConfig, tensors: dict[str, Any]) -> torch.dtype:
    """The checkpoint's own dtype: what its config says, else that of the first floating tensor."""
    if config.dtype is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    for tensor in tensors.values():
        dtype = torch_dtype(tensor)
        if dtype.is_floating_point:
            return dtype
    raise CheckpointError("the checkpoint holds no floating point tensor")


def torch_dtype(tensor_slice: Any) -> torch.dtype:
    """The dtype of a safetensors slice."""
    name = tensor_slice.get_dtype()
    if name not in str_to_torch_dtype:
        raise CheckpointError(f"dtype {name} of safetensors is not supported")
    dtype: torch.dtype = str_to_torch_dtype[name]
    return dtype


def in_one_line(error: Exception) -> str:
    """An error of another library: its own lines are one to a field, the rule and the value."""
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
