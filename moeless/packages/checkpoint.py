"""A checkpoint folder in Hugging Face format, looked over before anything is read from it in earnest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moeless.core.errors import CheckpointError
from moeless.packages.transformers_loader import causal_lm_class

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What the backbone's folder takes over beside config.json: generation settings, tokenizer, chat template."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that passed the checks of `open_checkpoint`."""

    path: Path
    config: PreTrainedConfig
    """That of the causal language model: the text part of a multimodal config where the class wants that."""
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


def open_checkpoint(path: Path) -> Checkpoint:
    """Check all of `path` that can be known without its tensors.

    Raises:
        CheckpointError: no such folder or config, remote code, quantized weights, no safetensors.
        UnsupportedFamilyError: transformers has no causal language model of this type.

    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder")
    raw_config = _read_json(path / "config.json")
    _check_model_type(path, raw_config)
    _check_quantization(path, raw_config)
    files = _weight_files(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a family's config class may raise anything on bad values
        raise CheckpointError(f"{path / 'config.json'}: {_first_line(error)}") from error
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is this a checkpoint?") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _check_model_type(path: Path, raw_config: dict[str, Any]) -> None:
    model_type = raw_config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if raw_config.get("auto_map"):
        raise CheckpointError(
            f"checkpoint {path} wants remote code (auto_map, model_type {model_type!r}), which moeless never runs"
        )
    raise CheckpointError(f"{path / 'config.json'}: model_type {model_type!r} is not known to transformers")


def _check_quantization(path: Path, raw_config: dict[str, Any]) -> None:
    for config in (raw_config, raw_config.get("text_config") or {}):
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown method")
            raise CheckpointError(
                f"checkpoint {path} is quantized ({method}), which cannot be packed; use one in bfloat16 or float32"
            )


def _weight_files(path: Path) -> tuple[Path, ...]:
    single = path / SAFE_WEIGHTS_NAME
    if single.is_file():
        return (single,)
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f", only {others[0]}" if others else ""
        raise CheckpointError(f"checkpoint {path} has no {SAFE_WEIGHTS_NAME}{found}; moeless reads safetensors only")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map must be an object, got {type(weight_map).__name__}")
    files = tuple(path / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {file.name}, which its index names")
    return files


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
