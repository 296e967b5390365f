"""Make traces of files that others wrote: what a file is, is told by its content, never by its name.

| source                                                           | becomes      |
|------------------------------------------------------------------|--------------|
| NPZ with experts and weights, and the sequences' lengths         | RoutingTrace |
| CSV with sequence, position, layer, expert_0.., weight_0..       | RoutingTrace |
| CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure)       | ArrivalTrace |
| CSV or NPZ with arrival_s, prompt_tokens, output_tokens          | ArrivalTrace |
| JSON lines with timestamp, input_length, output_length, hash_ids | ArrivalTrace |

Text may be compressed with gzip. Every fault is told with the file and its line or row.
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
from moeless_predictors.traces.importing_routing import ImportOptions, routing_from_csv, routing_from_npz
from moeless_predictors.traces.npz import NpzArrays
from moeless_predictors.traces.routing import RoutingTrace

_ZIP, _GZIP = b"PK", b"\x1f\x8b"


@dataclass(frozen=True)
class Imported:
    """A trace, and what a reader of it should know about how it was read."""

    trace: RoutingTrace | ArrivalTrace
    notices: tuple[str, ...]


def import_trace(path: str | os.PathLike[str], options: ImportOptions | None = None) -> Imported:
    """Read a file of any of the shapes above.

    Raises: TraceFormatError with the file and the line or row of the fault; OSError if the file cannot be read.
    """
    path, options, notices = Path(path), options or ImportOptions(), list[str]()
    trace: RoutingTrace | ArrivalTrace
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == _ZIP:
        with NpzArrays.open(path) as arrays:
            read = arrivals_from_npz if "arrival_s" in arrays.names else routing_from_npz
            trace = read(path, arrays, options, notices)
    else:
        with _opened_text(path, is_gzip=magic == _GZIP) as lines:
            first = lines.readline()
            lines.seek(0)
            if first.lstrip().startswith("{"):
                trace = arrivals_from_json_lines(path, lines, options, notices)
            elif "expert_0" in first:
                trace = routing_from_csv(path, lines, options, notices)
            else:
                trace = arrivals_from_csv(path, lines, options, notices)
    return Imported(trace, tuple(notices))


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
