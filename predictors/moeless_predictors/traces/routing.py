"""Routing traces: the experts that each token went to in each MoE layer, sequence by sequence.

Shapes: T tokens, L MoE layers, E experts, k experts per token, S sequences, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from moeless_predictors.arrays import AnyArray, FloatArray, IntArray
from moeless_predictors.traces.checks import (
    check_choices,
    check_finite,
    check_positions,
    check_range,
    check_shapes,
    check_starts,
)
from moeless_predictors.traces.container import TraceFormatError, read_container, write_container
from moeless_predictors.traces.ragged import join_texts, split_texts

PREFILL, DECODE = 0, 1
_MAX_EXPERTS = 1 << 16
_INT32 = int(np.iinfo(np.int32).max)
_INT64 = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True)
class TraceMetadata:
    """Model and shape of a routing trace."""

    model: str
    num_experts: int
    top_k: int
    num_layers: int
    """MoE layers, numbered from 0; the model's dense layers are not counted."""
    source: str = ""
    """Source of the trace, in words."""
    hidden_size: int | None = None
    """Values of a hidden state, where the trace has any."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("num_experts", self.num_experts, 1, _MAX_EXPERTS),
            ("num_layers", self.num_layers, 1, _INT32),
            ("top_k", self.top_k, 1, self.num_experts),
            ("hidden_size", 1 if self.hidden_size is None else self.hidden_size, 1, _INT32),
        ):
            if type(value) is not int or not low <= value <= high:
                raise TraceFormatError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        if not isinstance(self.model, str) or not isinstance(self.source, str):
            raise TraceFormatError(f"model and source must be texts, got {self.model!r} and {self.source!r}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RoutingTrace:
    """A checked trace. Rows are tokens; those of one sequence are contiguous and in order of position.

    Made by `from_arrays` or `open`. The arrays may be mapped from a file and must not be written to.
    """

    metadata: TraceMetadata
    experts_TLk: IntArray
    """Experts chosen, in the router's order; uint8, or uint16 where there are more than 256."""
    weights_TLk: FloatArray
    """Gate weights of the choices, float16."""
    sequence_starts_S1: IntArray
    """First row of each sequence, and at the end the number of rows; int64."""
    phase_T: IntArray
    """PREFILL or DECODE, uint8."""
    positions_T: IntArray
    """Position in the sequence, int32; may begin above 0 and leave some out."""
    token_ids_T: IntArray | None = None
    """int32."""
    steps_T: IntArray | None = None
    """int64; number of the forward step that computed the token: tokens of one step were one batch."""
    hidden: Mapping[int, FloatArray] = field(default_factory=lambda: MappingProxyType({}))
    """By MoE layer, the hidden states at its experts' input, shape (T, H), float16 or float32."""
    labels: tuple[str, ...] | None = None
    """One for each sequence."""

    @classmethod
    def from_arrays(
        cls,
        metadata: TraceMetadata,
        *,
        experts_TLk: ArrayLike,
        weights_TLk: ArrayLike,
        sequence_lengths_S: ArrayLike,
        phase_T: ArrayLike | None = None,
        token_ids_T: ArrayLike | None = None,
        positions_T: ArrayLike | None = None,
        steps_T: ArrayLike | None = None,
        hidden: Mapping[int, ArrayLike] | None = None,
        labels: Sequence[str] | None = None,
        where: str = "trace",
    ) -> Self:
        """Check arrays of any integer and float types and make a trace of them. Those of the right type are not copied.

        Args:
            phase_T: default: all DECODE.
            positions_T: default: from 0 in each sequence.
            where: what messages call the origin of the arrays, a file's name say.
        Raises: TraceFormatError that names column, row, layer and choice.
        """
        lengths_S = _integers(where, "sequence_lengths", sequence_lengths_S).reshape(-1)
        experts = _integers(where, "experts", experts_TLk)
        num_tokens = len(experts)
        starts_S1 = np.concatenate(([0], np.cumsum(lengths_S, dtype=np.int64)))
        check_starts(where, starts_S1, num_tokens=num_tokens)
        if positions_T is None:
            positions_T = np.arange(num_tokens) - np.repeat(starts_S1[:-1], lengths_S)
        phases = np.full(num_tokens, DECODE, np.uint8) if phase_T is None else _integers(where, "phase", phase_T)
        states = {layer: _floats(where, _hidden_name(layer), values) for layer, values in (hidden or {}).items()}
        if metadata.hidden_size is None and states:
            metadata = replace(metadata, hidden_size=int(next(iter(states.values())).shape[-1]))
        draft = cls(
            metadata=metadata,
            experts_TLk=experts,
            weights_TLk=_floats(where, "weights", weights_TLk),
            sequence_starts_S1=starts_S1,
            phase_T=phases,
            positions_T=_integers(where, "positions", positions_T),
            token_ids_T=None if token_ids_T is None else _integers(where, "token_ids", token_ids_T),
            steps_T=None if steps_T is None else _integers(where, "steps", steps_T),
            hidden=MappingProxyType(dict(sorted(states.items()))),
            labels=None if labels is None else tuple(map(str, labels)),
        )
        draft._check_shapes(where)
        draft._check_values(where)
        return draft._with_columns(lambda name, column: column.astype(_dtype_of(name, column, metadata), copy=False))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Map a trace from its file.

        Args:
            verify: read the whole file once and check every checksum and value; False checks the header, the
                columns' shapes and the sequences' boundaries, and is for files that were checked before.
        Raises: TraceFormatError with the position of the fault; OSError if the file cannot be read.
        """
        container = read_container(path, kind="routing", verify=verify)
        where, columns = str(path), dict(container.columns)
        if missing := {"experts", "weights", "sequence_starts", "phase", "positions"} - columns.keys():
            raise TraceFormatError(f"{where}: columns are missing: {', '.join(sorted(missing))}")
        labels = (
            split_texts(where, columns.pop("labels"), columns.pop("label_starts"))
            if {"labels", "label_starts"} <= columns.keys()
            else None
        )
        names = {name: _hidden_layer(name) for name in columns}
        if odd := sorted(columns.keys() - _COLUMNS.keys() - {n for n, layer in names.items() if layer is not None}):
            raise TraceFormatError(f"{where}: unknown columns: {', '.join(odd)}")
        try:
            metadata = TraceMetadata(**{name: container.fields[name] for name in _METADATA})
        except (KeyError, TraceFormatError) as error:
            raise TraceFormatError(f"{where}: metadata: {error}") from error
        for name, column in columns.items():
            if column.dtype != (expected := _dtype_of(name, column, metadata)):
                raise TraceFormatError(f"{where}: column {name!r} must have the type {expected}, got {column.dtype}")
        layers = sorted((layer, name) for name, layer in names.items() if layer is not None)
        trace = cls(
            metadata=metadata,
            hidden=MappingProxyType({layer: columns.pop(name) for layer, name in layers}),
            labels=labels,
            **{_COLUMNS[name]: column for name, column in columns.items()},
        )
        trace._check_shapes(where)
        check_starts(where, trace.sequence_starts_S1, num_tokens=trace.num_tokens)
        if verify:
            trace._check_values(where)
        return trace

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file, all or nothing. Columns that are mapped are not loaded for it."""
        columns = self._columns()
        if self.labels is not None:
            columns["labels"], columns["label_starts"] = join_texts(self.labels)
        write_container(path, kind="routing", fields=asdict(self.metadata), columns=columns)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.experts_TLk)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.metadata.num_layers

    @property
    def num_experts(self) -> int:
        """E."""
        return self.metadata.num_experts

    @property
    def top_k(self) -> int:
        """k."""
        return self.metadata.top_k

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sequence_starts_S1) - 1

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The MoE layers whose hidden states the trace has."""
        return tuple(self.hidden)

    @cached_property
    def sequence_of_T(self) -> IntArray:  # T is a shape letter
        """The sequence of each row."""
        return np.repeat(np.arange(self.num_sequences, dtype=np.int32), np.diff(self.sequence_starts_S1))

    @cached_property
    def previous_T(self) -> IntArray:
        """For each row, that of its sequence's token at the position before, or -1 where the trace lacks it."""
        previous_T = np.arange(-1, self.num_tokens - 1)
        has_gap_T = np.diff(self.positions_T, prepend=np.int32(0)) != 1
        previous_T[has_gap_T] = -1
        previous_T[self.sequence_starts_S1[:-1]] = -1
        return previous_T

    def take_sequences(self, indices: ArrayLike) -> Self:
        """A trace of these sequences, in this order; one that is named twice comes twice. Copies their rows.

        Raises: ValueError for no index or one that is out of range.
        """
        taken = _integers("take_sequences", "indices", indices).astype(np.int64)
        if taken.ndim != 1 or not len(taken) or taken.min() < 0 or taken.max() >= self.num_sequences:
            raise ValueError(f"indices must be a list of numbers from 0 to {self.num_sequences - 1}, got {indices!r}")
        starts = self.sequence_starts_S1[taken]
        lengths = self.sequence_starts_S1[taken + 1] - starts
        taken_starts = np.concatenate(([0], np.cumsum(lengths)))
        rows = np.arange(taken_starts[-1]) + np.repeat(starts - taken_starts[:-1], lengths)
        trace = self._with_columns(lambda name, column: taken_starts if name == "sequence_starts" else column[rows])
        if self.labels is None:
            return trace
        return replace(trace, labels=tuple(self.labels[i] for i in taken))

    def split(self, *, test_share: float = 0.2, seed: int = 0, by_label: bool = False) -> tuple[Self, Self]:
        """Split at random into a training and a test trace, by whole sequences, each at least one.

        The tokens of a sequence resemble each other: split by token, a test would ask for what was learned by heart.

        Args:
            test_share: share of the sequences, or of the labels, that go into the test, in (0, 1).
            by_label: keep the sequences of a label together: test on subjects that were not learned from.
        Raises: ValueError if there is but one sequence, or with `by_label` but one label.
        """
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must be above 0 and below 1, got {test_share}")
        if self.num_sequences < 2:
            raise ValueError(f"a split needs at least 2 sequences, got {self.num_sequences}")
        unit_of_S = np.arange(self.num_sequences)
        if by_label:
            unit_of_S = np.unique(self.labels or [""] * self.num_sequences, return_inverse=True)[1]
        num_units = int(unit_of_S.max()) + 1
        if num_units < 2:
            raise ValueError(f"a split by label needs sequences of at least 2 labels, got {num_units}")
        num_test = min(max(1, round(test_share * num_units)), num_units - 1)
        is_test_S = np.isin(unit_of_S, np.random.default_rng(seed).permutation(num_units)[:num_test])
        return self.take_sequences(np.flatnonzero(~is_test_S)), self.take_sequences(np.flatnonzero(is_test_S))

    def __repr__(self) -> str:
        return f"RoutingTrace({self.metadata}, num_tokens={self.num_tokens}, num_sequences={self.num_sequences})"

    def _columns(self) -> dict[str, AnyArray]:
        """The numeric columns by their names in the file."""
        columns = {name: getattr(self, attribute) for name, attribute in _COLUMNS.items()}
        present = {name: column for name, column in columns.items() if column is not None}
        return present | {_hidden_name(layer): states for layer, states in self.hidden.items()}

    def _with_columns(self, change: Callable[[str, AnyArray], AnyArray]) -> Self:
        """The same trace with every column changed, each given by its name in the file."""
        changed = {name: np.ascontiguousarray(change(name, column)) for name, column in self._columns().items()}
        hidden = {layer: changed.pop(_hidden_name(layer)) for layer in self.hidden}
        arguments = {_COLUMNS[name]: column for name, column in changed.items()}
        return replace(self, hidden=MappingProxyType(hidden), **arguments)  # type: ignore[arg-type]  # none is labels

    def _check_shapes(self, where: str) -> None:
        metadata, columns, num_tokens = self.metadata, self._columns(), self.num_tokens
        choices = (num_tokens, metadata.num_layers, metadata.top_k)
        expected: dict[str, tuple[int, ...]] = {"experts": choices, "weights": choices}
        for layer in self.hidden:
            if not 0 <= layer < metadata.num_layers:
                raise TraceFormatError(
                    f"{where}: hidden: layers must be from 0 to {metadata.num_layers - 1}, got {layer}"
                )
            expected[_hidden_name(layer)] = (num_tokens, metadata.hidden_size or 0)
        expected["sequence_starts"] = (self.num_sequences + 1,)
        check_shapes(where, {n: (column.shape, expected.get(n, (num_tokens,))) for n, column in columns.items()})
        if self.labels is not None and len(self.labels) != self.num_sequences:
            raise TraceFormatError(
                f"{where}: labels must be {self.num_sequences}, one a sequence, got {len(self.labels)}"
            )

    def _check_values(self, where: str) -> None:
        check_choices(where, self.experts_TLk, self.weights_TLk, num_experts=self.num_experts)
        check_positions(where, self.positions_T, self.sequence_starts_S1)
        check_range(where, "phase", self.phase_T, low=PREFILL, high=DECODE)
        if self.token_ids_T is not None:
            check_range(where, "token_ids", self.token_ids_T, low=0, high=_INT32)
        if self.steps_T is not None:
            check_range(where, "steps", self.steps_T, low=0, high=_INT64)
        for layer, states_TH in self.hidden.items():
            check_finite(where, _hidden_name(layer), states_TH)


def concat(traces: Iterable[RoutingTrace]) -> RoutingTrace:
    """Put traces of one model behind each other. Steps of each go on where those of the one before ended.

    Raises: ValueError if they differ in model, layers, experts, top_k or in which optional columns they have.
    """
    parts = list(traces)
    if not parts:
        raise ValueError("concat needs at least one trace, got none")
    first = parts[0]
    for part in parts[1:]:
        for name in ("model", "num_experts", "top_k", "num_layers", "hidden_size"):
            ours, theirs = getattr(first.metadata, name), getattr(part.metadata, name)
            if ours != theirs:
                raise ValueError(f"traces to put together must have the same {name}, got {ours!r} and {theirs!r}")
        ours, theirs = (sorted(p._columns()) + ["labels"] * (p.labels is not None) for p in (first, part))
        if ours != theirs:
            raise ValueError(f"traces to put together must have the same columns, got {ours} and {theirs}")

    def joined(name: str, _: AnyArray) -> AnyArray:
        columns = [part._columns()[name] for part in parts]
        if name == "sequence_starts":
            return np.concatenate(([0], np.cumsum(np.concatenate([np.diff(starts) for starts in columns]))))
        if name == "steps":
            ends = np.cumsum([0] + [int(steps.max()) + 1 for steps in columns[:-1]])
            columns = [steps + end for steps, end in zip(columns, ends, strict=True)]
        return np.concatenate(columns)

    labels = None if first.labels is None else tuple(label for part in parts for label in part.labels or ())
    sources = dict.fromkeys(part.metadata.source for part in parts if part.metadata.source)
    metadata = replace(first.metadata, source="; ".join(sources))
    return replace(first._with_columns(joined), metadata=metadata, labels=labels)


_METADATA = ("model", "num_experts", "top_k", "num_layers", "source", "hidden_size")
_COLUMNS = {
    "experts": "experts_TLk",
    "weights": "weights_TLk",
    "sequence_starts": "sequence_starts_S1",
    "phase": "phase_T",
    "positions": "positions_T",
    "token_ids": "token_ids_T",
    "steps": "steps_T",
}
_DTYPES: dict[str, type[np.generic]] = {
    "weights": np.float16,
    "sequence_starts": np.int64,
    "phase": np.uint8,
    "positions": np.int32,
    "token_ids": np.int32,
    "steps": np.int64,
}
_HIDDEN_PREFIX = "hidden."


def _dtype_of(name: str, column: AnyArray, metadata: TraceMetadata) -> np.dtype[Any]:
    """The type that a column has in memory and in the file; hidden states keep float16 and are else float32."""
    if name == "experts":
        return np.dtype(np.uint8 if metadata.num_experts <= 256 else np.uint16)
    if name in _DTYPES:
        return np.dtype(_DTYPES[name])
    return np.dtype(np.float16 if column.dtype == np.float16 else np.float32)


def _hidden_name(layer: int) -> str:
    return f"{_HIDDEN_PREFIX}{layer}"


def _hidden_layer(name: str) -> int | None:
    """The layer of a column of hidden states, or None for any other column."""
    number = name.removeprefix(_HIDDEN_PREFIX)
    return int(number) if number != name and number.isdecimal() and str(int(number)) == number else None


def _integers(where: str, name: str, values: ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim < 1:
        raise TraceFormatError(f"{where}: column {name!r} must be an array of whole numbers, got {array.dtype}")
    return array


def _floats(where: str, name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values)
    if array.dtype.kind != "f" or array.ndim < 1:
        raise TraceFormatError(
            f"{where}: column {name!r} must be an array of floating-point numbers, got {array.dtype}"
        )
    return array
