"""Tensors as the bytes of a safetensors file, and the names of their dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save

_ALIGNMENT_BYTES = 64


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file whose data starts on a cache line.

    A mapped tensor is as aligned as its offset in the file. safetensors aligns the header to 8 bytes; the format
    allows spaces after it, so more are added here.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    header_bytes = int.from_bytes(data[:8], "little")
    padding = -(8 + header_bytes) % _ALIGNMENT_BYTES
    header_end = 8 + header_bytes
    return b"".join(
        [(header_bytes + padding).to_bytes(8, "little"), data[8:header_end], b" " * padding, data[header_end:]]
    )


def dtype_name(dtype: torch.dtype) -> str:
    """For torch.bfloat16 "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of_name(name: str) -> torch.dtype:
    """Inverse of dtype_name. Raises ValueError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be the name of a torch dtype, got {name!r}")
    return dtype
