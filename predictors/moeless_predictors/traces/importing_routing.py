"""Routing files of other projects: NPZ in its known shapes, and CSV with a line for each token and layer.

Called by traces.importing. Shapes: T tokens, L MoE layers, k experts per token, S sequences.
"""

from __future__ import annotations

import csv
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

from moeless_predictors.arrays import AnyArray, FloatArray, IntArray
from moeless_predictors.traces.container import TraceFormatError
from moeless_predictors.traces.importing_formats import unknown_format
from moeless_predictors.traces.npz import NpzArrays
from moeless_predictors.traces.routing import DECODE, RoutingTrace, TraceMetadata

_MIN_EVIDENCE = 8
"""Pairs of neighbours that must rise by one before ids count as positions: fewer might be chance."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Facts that a file does not state itself."""

    model: str | None = None
    """Name of the model; default: the file's name."""
    phase: int = DECODE
    """PREFILL or DECODE, of every token, where the file has no phases."""
    num_experts: int | None = None
    """Experts of a layer; default: the highest that the file names, plus one."""
    top_k: int | None = None
    """Experts of a token, for ESFT's logs; default: inferred from their lines."""
    source: str | None = None
    """Source of the trace, in words; default: the file's name."""


def routing_from_npz(path: Path, arrays: NpzArrays, options: ImportOptions, notices: list[str]) -> RoutingTrace:
    """Read experts (or ids), weights (or weights_u8, 255 × the weight), the sequences' lengths and optional columns.

    Without weights each expert of a token gets the same, with a notice.

    Raises: TraceFormatError that names array and row.
    """
    names = {
        "experts": arrays.first_of("experts", "ids"),
        "weights": arrays.first_of("weights", "weights_u8"),
        "lengths": arrays.first_of("sequence_lengths", "seq_len", "sequence_starts"),
        "labels": arrays.first_of("labels", "category"),
        **{name: arrays.first_of(name) for name in ("token_ids", "positions", "phase", "steps")},
    }
    hidden = {int(name[7:]): name for name in arrays.names if name.startswith("hidden.") and name[7:].isdecimal()}
    if odd := arrays.names - {*names.values(), *hidden.values()}:
        notices.append(f"arrays that a trace has no place for were left out: {', '.join(sorted(odd))}")
    found = {role: arrays.read(name) for role, name in names.items() if name is not None}
    for role, expected in (
        ("experts", "experts or ids"),
        ("lengths", "sequence_lengths, seq_len or sequence_starts"),
    ):
        if role not in found:
            raise unknown_format(path, f"the arrays {', '.join(sorted(arrays.names))[:120]} without {expected}")
    experts_TLk = found["experts"]
    if experts_TLk.ndim != 3 or not experts_TLk.size or experts_TLk.dtype.kind not in "iu":
        raise TraceFormatError(
            f"{path}: array {names['experts']!r} must hold whole numbers of shape [tokens, layers, top-k], "
            f"got {experts_TLk.dtype} of shape {list(experts_TLk.shape)}"
        )
    lengths_S = found["lengths"]
    if names["lengths"] == "sequence_starts":
        if lengths_S.dtype.kind not in "iu" or lengths_S.ndim != 1 or not len(lengths_S) or lengths_S[0] != 0:
            raise TraceFormatError(f"{path}: array 'sequence_starts' must be whole numbers from 0, got {lengths_S[:3]}")
        lengths_S = np.diff(lengths_S.astype(np.int64))
    weights_TLk = found["weights"] if "weights" in found else _equal_weights(experts_TLk, notices)
    if names["weights"] == "weights_u8":
        if weights_TLk.dtype != np.uint8:
            raise TraceFormatError(f"{path}: array 'weights_u8' must be uint8, got {weights_TLk.dtype}")
        weights_TLk = (np.arange(256) / 255).astype(np.float16)[weights_TLk]
        notices.append("weights were kept as 8 bits: they are exact to 1/510")
    token_ids_T, positions_T = found.get("token_ids"), found.get("positions")
    if token_ids_T is not None and _count_up(token_ids_T, lengths_S):
        notices.append(
            "token_ids rise by exactly one within every sequence: they are positions, and the trace has no token ids"
        )
        positions_T, token_ids_T = (token_ids_T if positions_T is None else positions_T), None
    labels = found.get("labels")
    return RoutingTrace.from_arrays(
        metadata_of(path, options, experts_TLk, notices),
        experts_TLk=experts_TLk,
        weights_TLk=weights_TLk,
        sequence_lengths_S=lengths_S,
        phase_T=found.get("phase", np.full(len(experts_TLk), options.phase, np.uint8)),
        token_ids_T=token_ids_T,
        positions_T=positions_T,
        steps_T=found.get("steps"),
        hidden={layer: arrays.read(name) for layer, name in hidden.items()},
        labels=None if labels is None else labels.reshape(-1).tolist(),
        where=str(path),
    )


def _count_up(ids_T: AnyArray, lengths_S: AnyArray) -> bool:
    """Return whether ids rise by exactly one within every sequence, as positions do and token ids hardly ever."""
    if ids_T.dtype.kind not in "iu" or ids_T.ndim != 1 or lengths_S.dtype.kind not in "iu":
        return False
    ends_S = np.cumsum(lengths_S, dtype=np.int64)
    is_inside = np.ones(max(0, len(ids_T) - 1), dtype=bool)
    is_inside[ends_S[(ends_S > 0) & (ends_S < len(ids_T))] - 1] = False
    steps = np.diff(ids_T.astype(np.int64))[is_inside]
    return len(steps) >= _MIN_EVIDENCE and bool((steps == 1).all())


def _equal_weights(experts_TLk: IntArray, notices: list[str]) -> FloatArray:
    notices.append("the file has no gate weights: every expert of a token is given the same")
    return np.full(experts_TLk.shape, 1 / experts_TLk.shape[2])


def metadata_of(path: Path, options: ImportOptions, experts_TLk: IntArray, notices: list[str]) -> TraceMetadata:
    """The trace's metadata; notes where the number of experts had to be guessed."""
    _, num_layers, top_k = experts_TLk.shape
    num_experts = options.num_experts
    if num_experts is None:
        num_experts = max(int(experts_TLk.max()) + 1, top_k)
        notices.append(f"the file does not say how many experts there are: {num_experts} by the highest that is named")
    return TraceMetadata(
        model=options.model or path.name.removesuffix(".gz").rpartition(".")[0] or path.name,
        num_experts=num_experts,
        top_k=top_k,
        num_layers=num_layers,
        source=path.name if options.source is None else options.source,
    )


_COLUMN_NAMES = {
    "sequence_id": "sequence",
    "request_id": "sequence",
    "token": "position",
    "token_idx": "position",
    "token_index": "position",
    "token_position": "position",
    "layer_id": "layer",
    "layer_idx": "layer",
    "expert_ids": "experts",
    "expert_id": "experts",
}
"""Names that other recorders give the columns, and ours."""


def is_routing_header(line: str) -> bool:
    """Return whether a CSV's first line names columns of routing."""
    names = _column_names(line.strip().split(","))
    return any(name == "experts" or name.startswith("expert_") for name in names)


def _column_names(header: list[str]) -> list[str]:
    names = [name.strip().strip('"') for name in header]
    return [own if (own := _COLUMN_NAMES.get(name)) and own not in names else name for name in names]


def routing_from_csv(path: Path, lines: TextIO, options: ImportOptions, notices: list[str]) -> RoutingTrace:
    """Read a line for each token and layer: sequence, position, layer, expert_0.., optionally weight_0.., token_id,
    phase (0 prefill, 1 decode), step and label. A column `experts` may list a token's experts instead, separated by
    spaces or semicolons. Without `sequence`, a position that does not rise begins the next one. Without weights each
    expert of a token gets the same, with a notice.

    The lines of a token are together and go through the layers from 0; the tokens of a sequence are together and in
    order of position. `sequence` may be any text.

    Raises: TraceFormatError that names the line.
    """
    reader = csv.reader(lines, strict=True)
    header = _column_names(next(reader))
    lists = [place for place, name in enumerate(header) if name in _LISTS]
    rows: _CsvRows | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise TraceFormatError(f"{path}: line {reader.line_num}: {error}") from error
        if cells is None:
            break
        if not cells:
            continue
        parts = {place: _LIST_SEPARATOR.split(cells[place].strip("[]() ")) for place in lists if place < len(cells)}
        if rows is None:
            rows = _CsvRows(path, _expanded(header, {p: _numbered(header[p], len(parts[p])) for p in parts}))
        rows.add(reader.line_num, _expanded(cells, parts))
    if rows is None:
        raise TraceFormatError(f"{path}: must have at least one line of routing, got none")
    return rows.trace(options, notices)


_LISTS = {"experts": "expert", "weights": "weight"}
"""Columns that list a token's values in one cell, and the columns that these stand for."""
_LIST_SEPARATOR = re.compile(r"[ ;,|]+")


def _numbered(name: str, count: int) -> list[str]:
    return [f"{_LISTS[name]}_{number}" for number in range(count)]


def _expanded(cells: list[str], lists: dict[int, list[str]]) -> list[str]:
    """Cells with those at the lists' places replaced by the lists."""
    if not lists:
        return cells
    return [part for place, cell in enumerate(cells) for part in lists.get(place, [cell])]


@dataclass
class _CsvToken:
    """The token whose lines are being read."""

    sequence: str
    position: int
    next_layer: int
    values: tuple[str, ...] = field(default=())
    """Cells of the columns that belong to the token, not to the layer."""


class _CsvRows:
    """Takes the lines of a routing CSV one by one and keeps their values in compact arrays."""

    def __init__(self, path: Path, header: list[str]) -> None:
        self._path = path
        self._header = header
        self._top_k = sum(name.startswith("expert_") for name in header)
        self._has_weights = any(name.startswith("weight_") for name in header)
        kinds = ("expert", "weight") if self._has_weights else ("expert",)
        choices = [f"{kind}_{choice}" for kind in kinds for choice in range(self._top_k)]
        required, optional = ["position", "layer", *choices], ["sequence", "token_id", "phase", "step", "label"]
        if missing := [name for name in required if name not in header]:
            raise TraceFormatError(f"{path}: line 1: columns are missing: {', '.join(missing)}")
        if odd := [name for name in header if name not in required + optional or header.count(name) > 1]:
            raise TraceFormatError(f"{path}: line 1: columns that are unknown or come twice: {', '.join(odd)}")
        self._at = {name: header.index(name) for name in header}
        self._of_token = [name for name in optional if name in header and name not in ("sequence", "label")]
        self._experts, self._weights, self._positions = array("q"), array("d"), array("q")
        self._columns = {name: array("q") for name in self._of_token}
        self._starts, self._labels, self._seen = array("q"), list[str](), set[str]()
        self._num_layers: int | None = None
        self._token: _CsvToken | None = None
        self._line = 1

    def add(self, line: int, cells: list[str]) -> None:
        previous, self._line = self._token, line
        if len(cells) != len(self._header):
            self._fail(f"must have {len(self._header)} cells, got {len(cells)}")
        position, layer = self._whole(cells, "position"), self._whole(cells, "layer")
        sequence = self._sequence(cells, position, layer)
        of_token = tuple(cells[self._at[name]] for name in self._of_token)
        token = previous
        if token is None or (token.sequence, token.position) != (sequence, position) or layer == 0:
            self._end_token()
            token = self._token = self._begin_token(cells, sequence, position, of_token)
        elif token.values != of_token:
            self._fail(f"{', '.join(self._of_token)} must be those of the token's other layers, got {of_token}")
        if layer != token.next_layer:
            self._fail(f"layer must be {token.next_layer}, got {layer}")
        token.next_layer += 1
        for choice in range(self._top_k):
            self._experts.append(self._whole(cells, f"expert_{choice}"))
            if self._has_weights:
                self._weights.append(self._number(cells, f"weight_{choice}"))

    def _sequence(self, cells: list[str], position: int, layer: int) -> str:
        """Return the file's sequence id; without one, the number of positions so far that did not rise."""
        if "sequence" in self._at:
            return cells[self._at["sequence"]]
        if self._token is not None and layer == 0 and position <= self._token.position:
            return str(int(self._token.sequence) + 1)
        return "0" if self._token is None else self._token.sequence

    def trace(self, options: ImportOptions, notices: list[str]) -> RoutingTrace:
        if self._token is None:
            raise TraceFormatError(f"{self._path}: must have at least one line of routing, got none")
        self._line += 1
        self._end_token()
        num_tokens, num_layers = len(self._positions), self._num_layers
        experts_TLk = np.frombuffer(self._experts, np.int64).reshape(num_tokens, -1, self._top_k)
        weights_TLk = (
            np.frombuffer(self._weights, np.float64).reshape(experts_TLk.shape)
            if self._has_weights
            else _equal_weights(experts_TLk, notices)
        )
        assert experts_TLk.shape[1] == num_layers
        columns = {name: np.frombuffer(values, np.int64) for name, values in self._columns.items()}
        if "phase" not in columns:
            columns["phase"] = np.full(num_tokens, options.phase)
        return RoutingTrace.from_arrays(
            metadata_of(self._path, options, experts_TLk, notices),
            experts_TLk=experts_TLk,
            weights_TLk=weights_TLk,
            sequence_lengths_S=np.diff(np.array([*self._starts, num_tokens])),
            positions_T=np.frombuffer(self._positions, np.int64),
            phase_T=columns["phase"],
            token_ids_T=columns.get("token_id"),
            steps_T=columns.get("step"),
            labels=self._labels or None,
            where=str(self._path),
        )

    def _begin_token(self, cells: list[str], sequence: str, position: int, of_token: tuple[str, ...]) -> _CsvToken:
        if self._token is None or self._token.sequence != sequence:
            if sequence in self._seen:
                self._fail(f"the lines of a sequence must be together, but {sequence!r} comes again")
            self._seen.add(sequence)
            self._starts.append(len(self._positions))
            if "label" in self._at:
                self._labels.append(cells[self._at["label"]])
        elif position <= self._token.position:
            self._fail(f"position must be above {self._token.position}, that of the token before, got {position}")
        self._positions.append(position)
        for name in self._of_token:
            self._columns[name].append(self._whole(cells, name))
        return _CsvToken(sequence, position, 0, of_token)

    def _end_token(self) -> None:
        """Check that the token before the current line is complete."""
        if self._token is None:
            return
        self._num_layers = self._num_layers or self._token.next_layer
        if self._token.next_layer != self._num_layers:
            self._fail(
                f"the token before must have the {self._num_layers} layers of the first, got {self._token.next_layer}"
            )

    def _whole(self, cells: list[str], name: str) -> int:
        text = cells[self._at[name]]
        try:
            value = int(text)
        except ValueError:
            self._fail(f"{name} must be a whole number, got {text!r}")
        if not 0 <= value < 1 << 63:
            self._fail(f"{name} must be from 0 to below 2^63, got {value}")
        return value

    def _number(self, cells: list[str], name: str) -> float:
        text = cells[self._at[name]]
        try:
            value = float(text)
        except ValueError:
            self._fail(f"{name} must be a number, got {text!r}")
        if not 0 <= value < float("inf"):
            self._fail(f"{name} must be finite and >= 0, got {value}")
        return value

    def _fail(self, fault: str) -> NoReturn:
        raise TraceFormatError(f"{self._path}: line {self._line}: {fault}")
