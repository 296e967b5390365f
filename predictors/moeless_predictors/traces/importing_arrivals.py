"""Arrival files of other projects: CSV of Azure, BurstGPT and ServeGen, Mooncake's JSON lines, plain CSV and NPZ.

Called by traces.importing.
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import numpy as np

from moeless_predictors.traces.arrivals import ArrivalTrace
from moeless_predictors.traces.container import TraceFormatError
from moeless_predictors.traces.importing_formats import unknown_format
from moeless_predictors.traces.importing_routing import ImportOptions
from moeless_predictors.traces.npz import NpzArrays

_PLAIN = ("arrival_s", "prompt_tokens", "output_tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_SERVEGEN = ("timestamp", "input_tokens", "output_tokens")
_CSV_COLUMNS = (_AZURE, _BURSTGPT, _SERVEGEN, _PLAIN)
"""Time, prompt tokens and output tokens. Azure's times are dates, the others seconds."""
_INT64 = 1 << 63
_Value = TypeVar("_Value")


def arrivals_from_npz(path: Path, arrays: NpzArrays, options: ImportOptions, notices: list[str]) -> ArrivalTrace:
    """Read the arrays arrival_s, prompt_tokens and output_tokens. Raises TraceFormatError that names array and row."""
    if missing := set(_PLAIN) - arrays.names:
        raise TraceFormatError(f"{path}: arrays are missing: {', '.join(sorted(missing))}")
    if odd := arrays.names - set(_PLAIN):
        notices.append(f"arrays that a trace has no place for were left out: {', '.join(sorted(odd))}")
    arrival_s, prompt_tokens, output_tokens = (arrays.read(name) for name in _PLAIN)
    if arrival_s.dtype.kind not in "iuf":
        raise TraceFormatError(f"{path}: array 'arrival_s' must hold numbers, got {arrival_s.dtype}")
    return ArrivalTrace.from_arrays(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        source=_source(path, options),
        where=str(path),
    )


def arrivals_from_csv(path: Path, lines: TextIO, options: ImportOptions, notices: list[str]) -> ArrivalTrace:
    """Read the columns of one of _CSV_COLUMNS; further columns are ignored.

    BurstGPT's requests without response tokens failed there; they are left out, with a notice.

    Raises: TraceFormatError that names the line, or the columns found where they are of no known format.
    """
    reader = csv.reader(lines, strict=True)
    requests = _Requests(path)
    names: tuple[str, ...] = ()
    at: list[int] = []
    num_failed = 0
    try:
        for cells in reader:
            requests.line = reader.line_num
            if not at:
                header = [name.strip() for name in cells]
                names = next((known for known in _CSV_COLUMNS if set(known) <= set(header)), ())
                if not names:
                    raise unknown_format(path, f"the columns {', '.join(header)[:120]!r} in line 1")
                at, num_cells = [header.index(name) for name in names], len(header)
                continue
            if not cells:
                continue
            if len(cells) != num_cells:
                requests.fail(f"must have {num_cells} cells, got {len(cells)}")
            when, prompt, output = (cells[i] for i in at)
            seconds = requests.parsed(names[0], when, _timestamp if names is _AZURE else float)
            num_prompt, num_output = requests.parsed(names[1], prompt, int), requests.parsed(names[2], output, int)
            if names is _BURSTGPT and num_output == 0:
                num_failed += 1
                continue
            requests.add(seconds, num_prompt, num_output)
    except csv.Error as error:
        raise TraceFormatError(f"{path}: line {reader.line_num}: {error}") from error
    if num_failed:
        notices.append(f"requests without response tokens failed when they were recorded: {num_failed} left out")
    return requests.trace(options, notices)


def arrivals_from_json_lines(path: Path, lines: TextIO, options: ImportOptions, notices: list[str]) -> ArrivalTrace:
    """Read Mooncake's lines: timestamp in milliseconds, input_length, output_length, and hash_ids in all or none.

    Raises: TraceFormatError that names the line.
    """
    requests = _Requests(path)
    for number, line in enumerate(lines, start=1):
        requests.line = number
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceFormatError(f"{path}: line {number}: no JSON at column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting
            requests.fail(f"no JSON that can be read: {str(error)[:120]}")
        match entry:
            case {"timestamp": int() | float() as when, "input_length": int(prompt), "output_length": int(output)}:
                seconds = requests.parsed("timestamp", str(when), lambda text: float(text) / 1000)
                requests.add(seconds, prompt, output, _hashes(requests, entry))
            case _:
                requests.fail(
                    f"must have timestamp (ms), input_length and output_length as numbers, got {line.strip()[:120]}"
                )
    return requests.trace(options, notices)


def _hashes(requests: _Requests, entry: dict[str, object]) -> list[int] | None:
    match entry.get("hash_ids"):
        case None:
            return None
        case [*names] if all(isinstance(name, int) and -_INT64 <= name < _INT64 for name in names):
            return [name for name in names if isinstance(name, int)]
        case other:
            requests.fail(f"hash_ids must be a list of 64-bit whole numbers, got {str(other)[:80]}")


def _timestamp(text: str) -> float:
    """Seconds of a time like 2023-11-16 18:15:46.6805900; digits after the sixth are dropped."""
    when = datetime.fromisoformat(text)
    origin = datetime(2000, 1, 1, tzinfo=when.tzinfo)
    return (when - origin).total_seconds()


def _source(path: Path, options: ImportOptions) -> str:
    return path.name if options.source is None else options.source


class _Requests:
    """Takes requests one by one; `line` is the one that messages name."""

    def __init__(self, path: Path) -> None:
        self.line = 1
        self._path = path
        self._arrivals, self._prompts, self._outputs = array("d"), array("q"), array("q")
        self._blocks: list[list[int]] = []

    def add(self, arrival_s: float, prompt_tokens: int, output_tokens: int, blocks: list[int] | None = None) -> None:
        if not math.isfinite(arrival_s):
            self.fail(f"the time must be finite, got {arrival_s}")
        for name, value in (("prompt", prompt_tokens), ("output", output_tokens)):
            if not 0 <= value < 1 << 31:
                self.fail(f"{name} tokens must be from 0 to below 2^31, got {value}")
        if len(self._blocks) != (0 if blocks is None else len(self._arrivals)):
            self.fail("hash_ids must be in all lines or in none")
        if blocks is not None:
            self._blocks.append(blocks)
        self._arrivals.append(arrival_s)
        self._prompts.append(prompt_tokens)
        self._outputs.append(output_tokens)

    def parsed(self, name: str, text: str, parse: Callable[[str], _Value]) -> _Value:
        try:
            return parse(text.strip())
        except (ValueError, OverflowError) as error:
            self.fail(f"{name} cannot be read: {error}")

    def trace(self, options: ImportOptions, notices: list[str]) -> ArrivalTrace:
        """The requests in the order of their arrival."""
        if not self._arrivals:
            raise TraceFormatError(f"{self._path}: must have at least one request, got none")
        arrival_s = np.frombuffer(self._arrivals)
        order = np.argsort(arrival_s, kind="stable")
        if (num_late := int((np.diff(arrival_s) < 0).sum())) > 0:
            notices.append(f"requests were put in order of arrival: {num_late} came before the one above them")
        return ArrivalTrace.from_arrays(
            arrival_s=arrival_s[order],
            prompt_tokens=np.frombuffer(self._prompts, np.int64)[order],
            output_tokens=np.frombuffer(self._outputs, np.int64)[order],
            block_hashes=[self._blocks[i] for i in order] if self._blocks else None,
            source=_source(self._path, options),
            where=str(self._path),
        )

    def fail(self, fault: str) -> NoReturn:
        raise TraceFormatError(f"{self._path}: line {self.line}: {fault}")
