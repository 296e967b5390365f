"""Import traces from files of other projects; the format is recognised by content, never by name.

| source                                                           | becomes      |
|------------------------------------------------------------------|--------------|
| NPZ with experts (and weights), and the sequences' lengths       | RoutingTrace |
| CSV with sequence, position, layer, expert_0.. (and weight_0..)  | RoutingTrace |
| folder of ESFT's expert logs, or the log of one layer            | RoutingTrace |
| CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure)       | ArrivalTrace |
| CSV with Timestamp, Request tokens, Response tokens (BurstGPT)   | ArrivalTrace |
| CSV with timestamp, input_tokens, output_tokens (ServeGen)       | ArrivalTrace |
| CSV or NPZ with arrival_s, prompt_tokens, output_tokens          | ArrivalTrace |
| JSON lines with timestamp, input_length, output_length, hash_ids | ArrivalTrace |

Text may be compressed with gzip. Every error names the file and its line or row; an unknown file's error names what was
found in it and the known formats.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from moeless_predictors.traces.arrivals import ArrivalTrace
from moeless_predictors.traces.container import TraceFormatError
from moeless_predictors.traces.importing_arrivals import arrivals_from_csv, arrivals_from_json_lines, arrivals_from_npz
from moeless_predictors.traces.importing_esft import is_esft_line, routing_from_esft
from moeless_predictors.traces.importing_formats import refuse_without_trace
from moeless_predictors.traces.importing_routing import (
    ImportOptions,
    is_routing_header,
    routing_from_csv,
    routing_from_npz,
)
from moeless_predictors.traces.npz import NpzArrays
from moeless_predictors.traces.routing import RoutingTrace

_ZIP, _GZIP = b"PK", b"\x1f\x8b"


@dataclass(frozen=True)
class Imported:
    """A trace, and what a reader of it should know about how it was read."""

    trace: RoutingTrace | ArrivalTrace
    notices: tuple[str, ...]


def import_trace(path: str | os.PathLike[str], options: ImportOptions | None = None) -> Imported:
    """Read a file, or a folder of ESFT's logs, of any of the formats above.

    Raises: TraceFormatError with the file and the line or row of the fault; OSError if the file cannot be read.
    """
    path, options, notices = Path(path), options or ImportOptions(), list[str]()
    return Imported(_trace(path, options, notices), tuple(notices))


def _trace(path: Path, options: ImportOptions, notices: list[str]) -> RoutingTrace | ArrivalTrace:
    if path.is_dir():
        return routing_from_esft(path, options, notices)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_ZIP):
        with NpzArrays.open(path) as arrays:
            if "arrival_s" in arrays.names:
                return arrivals_from_npz(path, arrays, options, notices)
            return routing_from_npz(path, arrays, options, notices)
    with _opened_text(path, is_gzip=magic.startswith(_GZIP)) as lines:
        first = "" if magic == b"PAR1" else lines.readline()
        refuse_without_trace(path, magic, first)
        lines.seek(0)
        if first.lstrip().startswith("{"):
            return arrivals_from_json_lines(path, lines, options, notices)
        if is_esft_line(first):
            return routing_from_esft(path, options, notices)
        if is_routing_header(first):
            return routing_from_csv(path, lines, options, notices)
        return arrivals_from_csv(path, lines, options, notices)


@contextmanager
def _opened_text(path: Path, *, is_gzip: bool) -> Iterator[TextIO]:
    open_bytes = gzip.open if is_gzip else open
    with open_bytes(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        try:
            yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceFormatError(f"{path}: damaged or truncated gzip: {error}") from error
        except UnicodeDecodeError as error:
            raise TraceFormatError(f"{path}: must be an NPZ file or UTF-8 text of a known shape: {error}") from error
