"""The file behind every trace: named columns in a safetensors file, with checksums and JSON in its metadata.

Called by traces.routing and traces.arrivals, which say what the columns mean. docs/traces.md documents the bytes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moeless_predictors.arrays import AnyArray

FORMAT = "moeless-trace"
VERSION = 1
BLOCK_BYTES = 1 << 20
"""Bytes of a column that share a checksum: small enough to say where the damage is, 10 bytes of header for each."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DTYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class TraceFormatError(ValueError):
    """A trace or a source of traces breaks a rule; the message names the file and the position of the fault."""


@dataclass(frozen=True)
class Container:
    """An open file: what its JSON says, and its columns, mapped."""

    fields: dict[str, Any]
    columns: dict[str, AnyArray]


@dataclass(frozen=True)
class _Span:
    """Position of a column in the file, in bytes from its start."""

    begin: int
    end: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return max(1, (self.end - self.begin) // max(1, self.shape[0] if self.shape else 1))


def write_container(
    path: str | os.PathLike[str], *, kind: str, fields: Mapping[str, object], columns: Mapping[str, AnyArray]
) -> None:
    """Write all or nothing: a sibling file is written, flushed to the disk and renamed.

    Reads each column twice, block by block (for the checksums, then to write it), so that mapped columns stay mapped.

    Args:
        kind: "routing" or "arrivals".
        fields: what goes into the JSON beside kind and checksums.
        columns: C-contiguous arrays of the data types that the format knows.
    Raises: OSError if the file cannot be written.
    """
    checksums = {name: [f"{crc:08x}" for crc in _block_checksums(column)] for name, column in columns.items()}
    trace = json.dumps({"kind": kind, **fields, "block_bytes": BLOCK_BYTES, "checksums": checksums})
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "trace": trace,
        "trace_crc32": f"{zlib.crc32(trace.encode()):08x}",
    }
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode  # as the user's umask has it; the library would leave the file to its owner alone
        save_file(dict(columns), draft, metadata=metadata)
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error  # not the sibling's name
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(target)) from error
    finally:
        draft.unlink(missing_ok=True)


def read_container(path: str | os.PathLike[str], *, kind: str, verify: bool) -> Container:
    """Map a file's columns.

    Args:
        verify: compare every block with its checksum, which reads the whole file once; otherwise the header alone
            is checked, against the rules and the file's length.
    Raises: TraceFormatError; OSError if the file cannot be read.
    """
    size = os.path.getsize(path)
    if size < 8:
        raise TraceFormatError(f"{path}: truncated: ends at byte {size}, the length of the header alone takes 8")
    bytes_N = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    size = len(bytes_N)  # of the file that is mapped now, whatever happened to its name since
    data_begin = 8 + int.from_bytes(bytes_N[:8].tobytes(), "little")
    if data_begin > 8 + _MAX_HEADER_BYTES or (size > 8 and bytes_N[8] != ord("{")):
        raise TraceFormatError(f"{path}: not a trace: a safetensors file with format {FORMAT!r} is expected")
    if size < data_begin:
        raise TraceFormatError(f"{path}: truncated: ends at byte {size}, the header alone ends at byte {data_begin}")
    header = _header(path, bytes_N[8:data_begin].tobytes())
    fields = _fields(path, header.pop("__metadata__", None))
    spans = _spans(path, header, data_begin=data_begin, size=size)
    if fields.get("kind") != kind:
        raise TraceFormatError(f"{path}: kind must be {kind!r} here, got {fields.get('kind')!r}")
    if verify:
        _verify_blocks(path, bytes_N, spans, fields)
    columns = {
        name: bytes_N[span.begin : span.end].view(span.dtype).reshape(span.shape) for name, span in spans.items()
    }
    return Container(fields, columns)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of a trace by its header, or None for a file that does not begin like a trace."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            return None
        raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        return None
    kind = _fields(path, _header(path, raw).get("__metadata__")).get("kind")
    return kind if isinstance(kind, str) else None


def _header(path: object, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except json.JSONDecodeError as error:
        raise TraceFormatError(f"{path}: damaged header: no JSON at byte {8 + error.pos}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path}: damaged header: no UTF-8 at byte {8 + error.start}") from error
    except RecursionError as error:
        raise TraceFormatError(f"{path}: damaged header: nested too deeply") from error
    if not isinstance(header, dict):
        raise TraceFormatError(f"{path}: damaged header: an object is expected, got {type(header).__name__}")
    return header


def _fields(path: object, metadata: object) -> dict[str, Any]:
    """The trace's own JSON, checked against its checksum."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else None
        raise TraceFormatError(f"{path}: not a trace: its metadata must have format {FORMAT!r}, got {found!r}")
    if metadata.get("version") != str(VERSION):
        raise TraceFormatError(f"{path}: version must be {VERSION} for this release, got {metadata.get('version')!r}")
    trace = metadata.get("trace")
    if not isinstance(trace, str):
        raise TraceFormatError(f"{path}: damaged header: __metadata__.trace must be a string of JSON, got {trace!r}")
    crc = f"{zlib.crc32(trace.encode('utf-8', 'surrogatepass')):08x}"
    if crc != metadata.get("trace_crc32"):
        raise TraceFormatError(
            f"{path}: damaged header: crc32 of __metadata__.trace must be {metadata.get('trace_crc32')!r}, got {crc!r}"
        )
    fields = json.loads(trace)
    if not isinstance(fields, dict):
        raise TraceFormatError(f"{path}: damaged header: __metadata__.trace must hold an object, got {trace[:40]!r}")
    return fields


def _spans(path: object, header: Mapping[str, Any], *, data_begin: int, size: int) -> dict[str, _Span]:
    """The columns' places. They must fill the file from the header to its end."""
    spans = {name: _span(path, name, entry, data_begin) for name, entry in header.items()}
    position = data_begin
    for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
        if span.begin != position:
            raise TraceFormatError(
                f"{path}: damaged header: column {name!r} must begin at byte {position}, got {span.begin}"
            )
        position = span.end
    if size < position:
        cut = next((name for name, span in spans.items() if span.begin <= size < span.end), None)
        raise TraceFormatError(
            f"{path}: truncated: ends at byte {size} in column {cut!r}, should end at byte {position}"
        )
    if size > position:
        raise TraceFormatError(f"{path}: the last column ends at byte {position}, but the file at byte {size}")
    return spans


def _span(path: object, name: str, entry: object, data_begin: int) -> _Span:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            code in _DTYPES and shape and (shape == [0] or all(type(n) is int and n > 0 for n in shape))
        ):
            dtype = np.dtype(_DTYPES[code])
        case _:
            raise TraceFormatError(
                f"{path}: damaged header: column {name!r} must have a shape, data_offsets and a dtype of "
                f"{', '.join(_DTYPES)}, got {json.dumps(entry)[:120]}"
            )
    num_bytes = dtype.itemsize
    for length in shape:
        num_bytes *= length
    if begin < 0 or end - begin != num_bytes:
        raise TraceFormatError(
            f"{path}: damaged header: column {name!r} of shape {shape} and dtype {code} takes {num_bytes} bytes, "
            f"got data_offsets [{begin}, {end}]"
        )
    return _Span(data_begin + begin, data_begin + end, dtype, tuple(shape))


def _verify_blocks(path: object, bytes_N: AnyArray, spans: Mapping[str, _Span], fields: Mapping[str, Any]) -> None:
    checksums, block_bytes = fields.get("checksums"), fields.get("block_bytes")
    if not isinstance(checksums, dict) or type(block_bytes) is not int or block_bytes < 1:
        raise TraceFormatError(f"{path}: damaged header: checksums and block_bytes >= 1 are missing")
    if checksums.keys() != spans.keys():
        odd = sorted(checksums.keys() ^ spans.keys())
        raise TraceFormatError(f"{path}: damaged header: every column must have checksums and no other, got {odd}")
    for name, span in spans.items():
        expected = checksums[name]
        found = [f"{crc:08x}" for crc in _block_checksums(bytes_N[span.begin : span.end], block_bytes)]
        if not isinstance(expected, list) or len(found) != len(expected):
            raise TraceFormatError(
                f"{path}: column {name!r} must have {len(found)} checksums for its blocks, got {str(expected)[:80]}"
            )
        for index, (crc, should_be) in enumerate(zip(found, expected, strict=True)):
            if crc != should_be:
                begin, end = index * block_bytes, min((index + 1) * block_bytes, span.end - span.begin)
                raise TraceFormatError(
                    f"{path}: damaged column {name!r}: bytes {span.begin + begin} to {span.begin + end} "
                    f"(rows {begin // span.row_bytes} to {(end - 1) // span.row_bytes}) must have crc32 {should_be}, "
                    f"got {crc}"
                )


def _block_checksums(column: AnyArray, block_bytes: int = BLOCK_BYTES) -> Iterator[int]:
    flat = column.reshape(-1).view(np.uint8)
    for begin in range(0, len(flat), block_bytes):
        yield zlib.crc32(flat[begin : begin + block_bytes].data)
