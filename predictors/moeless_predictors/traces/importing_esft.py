"""Expert logs of ESFT (deepseek-ai/ESFT, `log_expert_weights`): a file for each layer, a line for each sequence.

A line holds the chosen experts of all tokens of the sequence, k after k, then an empty cell, then their gate weights,
all separated by tabs. The files are named `expert_weights_<layer>.txt`; several processes write folders `rank_<n>`.

Called by traces.importing. Shapes: T tokens, L MoE layers, k experts per token, S sequences.
"""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path

import numpy as np

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.traces.container import TraceFormatError
from moeless_predictors.traces.importing_routing import ImportOptions, metadata_of
from moeless_predictors.traces.routing import RoutingTrace

_FILE_NAME = re.compile(r"expert_weights_(\d+)\.txt")
_RANK_NAME = re.compile(r"rank_(\d+)")
_SEPARATOR = "\t\t"
_GZIP = b"\x1f\x8b"


def is_esft_line(line: str) -> bool:
    """Return whether a file's first line has the form of an expert log."""
    return bool(re.match(r"\d+(\t\d+)*\t\t\d", line))


def routing_from_esft(path: Path, options: ImportOptions, notices: list[str]) -> RoutingTrace:
    """Read a folder of logs, with or without `rank_<n>` folders, or the log of one layer.

    Raises: TraceFormatError that names file and line.
    """
    folders = _folders(path)
    by_layer = [_logs(folder) for folder in folders] if path.is_dir() else [{0: path}]
    layers = sorted(by_layer[0])
    for folder, logs in zip(folders, by_layer, strict=True):
        if sorted(logs) != layers:
            raise TraceFormatError(f"{folder}: must have the layers {layers} as {folders[0]}, got {sorted(logs)}")
    parts = [[_Log(logs[layer]) for layer in layers] for logs in by_layer]
    for logs_of_layers in parts:
        for log in logs_of_layers[1:]:
            log.check_like(logs_of_layers[0])
    lengths_S = np.concatenate([logs_of_layers[0].lengths_S for logs_of_layers in parts])
    columns = [np.concatenate([part[i].experts for part in parts]) for i in range(len(layers))]
    weights = [np.concatenate([part[i].weights for part in parts]) for i in range(len(layers))]
    top_k = _top_k(path, columns, lengths_S, options, notices)
    experts_TLk = np.stack([column.reshape(-1, top_k) for column in columns], axis=1)
    if path.is_dir():
        notices.append(f"layers of the trace are counted from 0; in the logs they are {_described(layers)}")
    return RoutingTrace.from_arrays(
        metadata_of(path, options, experts_TLk, notices),
        experts_TLk=experts_TLk,
        weights_TLk=np.stack([column.reshape(-1, top_k) for column in weights], axis=1),
        sequence_lengths_S=lengths_S // top_k,
        phase_T=np.full(len(experts_TLk), options.phase, np.uint8),
        where=str(path),
    )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    ranks = {int(m[1]): entry for entry in path.iterdir() if (m := _RANK_NAME.fullmatch(entry.name)) and entry.is_dir()}
    return [ranks[rank] for rank in sorted(ranks)] or [path]


def _logs(folder: Path) -> dict[int, Path]:
    found = {int(m[1]): entry for entry in folder.iterdir() if (m := _FILE_NAME.fullmatch(entry.name))}
    if not found:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise TraceFormatError(
            f"{folder}: a folder must hold ESFT's expert logs, expert_weights_<layer>.txt, or folders rank_<n> with "
            f"them, got {names}"
        )
    return found


class _Log:
    """One layer's log: experts and weights of all tokens in a row, and how many of them each line holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        experts, weights, lengths = [], [], []
        with path.open("rb") as file:
            opened = gzip.open if file.read(2) == _GZIP else open
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                cells, separator, weight_cells = line.strip().partition(_SEPARATOR)
                try:
                    experts.append(np.array(cells.split("\t"), dtype=np.int64))
                    weights.append(np.array(weight_cells.split("\t"), dtype=np.float64))
                except (ValueError, OverflowError) as error:
                    rule = "experts, an empty cell, gate weights" if not separator else str(error)
                    raise TraceFormatError(
                        f"{path}: line {number}: must hold tab-separated {rule}, got {line.strip()[:60]!r}"
                    ) from error
                if len(experts[-1]) != len(weights[-1]):
                    raise TraceFormatError(
                        f"{path}: line {number}: must have as many gate weights as experts, {len(experts[-1])}, "
                        f"got {len(weights[-1])}"
                    )
                lengths.append(len(experts[-1]))
        if not lengths:
            raise TraceFormatError(f"{path}: must have at least one line, got none")
        self.experts: IntArray = np.concatenate(experts)
        self.weights: FloatArray = np.concatenate(weights)
        self.lengths_S: IntArray = np.array(lengths)

    def check_like(self, other: _Log) -> None:
        """Raises TraceFormatError unless every line holds as many choices as in the other layer's log."""
        if len(self.lengths_S) != len(other.lengths_S):
            raise TraceFormatError(
                f"{self.path}: must have {len(other.lengths_S)} lines as {other.path.name}, got {len(self.lengths_S)}"
            )
        if (differs := np.flatnonzero(self.lengths_S != other.lengths_S)).size:
            line = int(differs[0])
            raise TraceFormatError(
                f"{self.path}: line {line + 1}: must have {other.lengths_S[line]} experts as in {other.path.name}, "
                f"got {self.lengths_S[line]}"
            )


def _top_k(path: Path, columns: list[IntArray], lengths_S: IntArray, options: ImportOptions, notices: list[str]) -> int:
    """k as given, or the largest that divides every line into groups of different experts."""
    divisor = math.gcd(*lengths_S.tolist())
    if options.top_k is not None:
        if divisor % options.top_k:
            raise TraceFormatError(
                f"{path}: top_k must divide the number of experts of every line, got {options.top_k}, "
                f"whose lines hold multiples of {divisor}"
            )
        return options.top_k
    fitting = [k for k in range(1, divisor + 1) if divisor % k == 0 and all(_all_differ(c, k) for c in columns)]
    top_k = fitting[-1]
    notices.append(
        f"the logs do not say how many experts a token has: {top_k}, the largest number that cuts every line into "
        "groups of different experts"
    )
    return top_k


def _all_differ(experts: IntArray, top_k: int) -> bool:
    ordered_nk = np.sort(experts.reshape(-1, top_k), axis=1)
    return not (ordered_nk[:, 1:] == ordered_nk[:, :-1]).any()


def _described(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
