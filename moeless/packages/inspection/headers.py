"""Read the headers of safetensors files: names, dtypes and shapes, checked against the files' sizes.

The format: 8 bytes of header length, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from moeless.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_TENSORS = 300_000
"""Bound of a checkpoint's tensors. Models of a trillion parameters have 200,000."""
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


_MAX_DIMENSIONS = 16
_MAX_NAME = 500
_Size = Annotated[int, msgspec.Meta(le=1 << 48)]
"""Bounded, as is their number: the product of a million sizes of 64 bits takes minutes."""


class TensorHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a file."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[int, int]


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Tensor name → header, of all files together.

    Raises: CheckpointError if a file is not whole, a header contradicts itself, or two files hold the same tensor.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        found = _read_header(file)
        twice = headers.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{file}: tensor {min(twice)} must be in one file only, is in another as well")
        headers.update(found)
        if len(headers) > MAX_TENSORS:
            raise CheckpointError(f"{file}: a checkpoint must hold at most {MAX_TENSORS} tensors, this holds more")
    return headers


def _read_header(file: Path) -> dict[str, TensorHeader]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file}: not a readable safetensors file (header of {length} bytes in a file of {size})"
                )
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        headers = {name: msgspec.json.decode(value, type=TensorHeader) for name, value in raw.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file (header: {error})") from error
    _check_layout(file, headers, size - 8 - length)
    return headers


def _check_layout(file: Path, headers: Mapping[str, TensorHeader], num_bytes: int) -> None:
    """Tensors follow one another without gaps, each as long as its shape says, and fill the file."""
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        if len(name) > _MAX_NAME or not name.isprintable():
            raise CheckpointError(
                f"{file}: names of tensors must be printable, of at most {_MAX_NAME} characters, got {name!r:.60}"
            )
        if header.dtype not in _BITS:
            raise CheckpointError(f"{file}: dtype of tensor {name} must be one of safetensors', got {header.dtype!r}")
        if any(size < 0 for size in header.shape):
            raise CheckpointError(f"{file}: sizes of tensor {name} must be at least 0, got {list(header.shape)}")
        start, stop = header.data_offsets
        expected = math.prod(header.shape) * _BITS[header.dtype] // 8
        if start != end or stop - start != expected:
            raise CheckpointError(
                f"{file}: not a readable safetensors file (tensor {name} of shape {list(header.shape)} and dtype "
                f"{header.dtype} must take bytes {end} to {end + expected}, takes {start} to {stop})"
            )
        end = stop
    if end != num_bytes:
        raise CheckpointError(
            f"{file}: not a readable safetensors file (its tensors take {end} bytes, the file holds {num_bytes})"
        )
