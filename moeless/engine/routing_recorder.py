"""Records the routing of what an engine computes, as a trace for moeless_predictors.

RoutingRecorder is the observer that copies rows while the model runs; recording_service.py starts and stops it for a
server.
Memory is reserved once, for a number of rows; the system hands it out page by page as rows come.

Shapes: N rows recorded, T rows of a step, L MoE layers, k experts per token, H hidden size.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless.core.arrays import Float32Array, Int64Array
from moeless.core.errors import RequestError
from moeless.core.recording import RecordingOptions, recorded_row_bytes
from moeless.engine.observing import RoutedSequence, RowSpan, StepObservers, rows_in
from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace, TraceMetadata

WRITE_EVERY = 16
"""Steps whose routing is kept as it came before it is copied to its place."""
_MAX_ROWS_UNWRITTEN = 1024
_MAX_FLOAT16 = 65504.0


def row_bytes(metadata: TraceMetadata, options: RecordingOptions) -> int:
    """Bytes that one recorded row takes in memory."""
    return recorded_row_bytes(
        num_layers=metadata.num_layers,
        num_experts=metadata.num_experts,
        top_k=metadata.top_k,
        hidden_size=metadata.hidden_size or 0,
        num_hidden_layers=len(options.hidden_layers),
        token_ids=options.token_ids,
    )


def check_options(options: RecordingOptions, metadata: TraceMetadata) -> None:
    """Raises RequestError that names the option, the rule and the value."""
    if options.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {options.max_tokens}", param="max_tokens")
    last = metadata.num_layers - 1
    for layer in options.hidden_layers:
        if not 0 <= layer <= last:
            raise RequestError(f"hidden_layers must be from 0 to {last}, got {layer}", param="hidden_layers")
    if len(set(options.hidden_layers)) < len(options.hidden_layers):
        raise RequestError(f"hidden_layers must differ, got {list(options.hidden_layers)}", param="hidden_layers")


class _Columns:
    """The rows so far, in the order in which they were computed."""

    def __init__(self, metadata: TraceMetadata, options: RecordingOptions) -> None:
        n, choices = options.max_tokens, (metadata.num_layers, metadata.top_k)
        self.experts_NLk = np.empty((n, *choices), dtype=_expert_dtype(metadata.num_experts))
        self.weights_NLk = np.empty((n, *choices), dtype=np.float32)
        self.token_ids_N = np.empty(n, dtype=np.int32) if options.token_ids else None
        self.spans_N4 = np.empty((n, 4), dtype=np.int32)
        """Owners of the rows, span by span: sequence, first position, number of rows, step."""
        self.hidden: dict[int, NDArray[np.float16]] = {
            layer: np.empty((n, metadata.hidden_size or 0), dtype=np.float16) for layer in options.hidden_layers
        }
        self.num_rows = 0
        """Rows of all steps that have ended; of those in `steps` only the hidden states are written yet."""
        self.num_steps = 0
        self.prompt_lengths: list[int] = []
        """By sequence."""
        self._steps: list[_Step] = []
        self._num_written = 0
        self._num_spans = 0

    def add(self, step: _Step) -> None:
        """Take a step that has ended."""
        self._steps.append(step)
        self.num_rows += step.num_rows
        self.num_steps += 1
        if len(self._steps) >= WRITE_EVERY or self.num_rows - self._num_written >= _MAX_ROWS_UNWRITTEN:
            self.write()

    def write(self) -> None:
        """Copy the steps that are not written yet, all at once: numpy's calls cost more than the few rows of a step."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        start, stop = self._num_written, self.num_rows
        for layer in range(self.experts_NLk.shape[1]):
            self.experts_NLk[start:stop, layer] = np.concatenate([step.experts_LTk[layer][step.rows] for step in steps])
            self.weights_NLk[start:stop, layer] = np.concatenate([step.weights_LTk[layer][step.rows] for step in steps])
        spans = [
            (sequence, span.first_position, span.num_rows, step.number)
            for step in steps
            for sequence, span in zip(step.sequences_S, step.spans, strict=True)
        ]
        self.spans_N4[self._num_spans : self._num_spans + len(spans)] = spans
        if self.token_ids_N is not None:
            found = [s.sequence.token_ids(s.first_position, s.num_rows) for step in steps for s in step.spans]
            self.token_ids_N[start:stop] = list(chain.from_iterable(found))
        self._num_written = stop
        self._num_spans += len(spans)

    def to_trace(self, metadata: TraceMetadata) -> RoutingTrace:
        """Sort the rows by sequence and position, each position once, and cut the sequences at their gaps."""
        self.write()
        spans_S4 = self.spans_N4[: self._num_spans].astype(np.int64)
        lengths_S = spans_S4[:, 2]
        sequences, firsts, _, steps = np.repeat(spans_S4, lengths_S, axis=0).T
        ends_S = np.cumsum(lengths_S)
        positions = firsts + np.arange(ends_S[-1]) - np.repeat(ends_S - lengths_S, lengths_S)
        rows = np.lexsort((positions, sequences))  # stable: of a position that was computed twice, the first is first
        is_same = np.diff(sequences[rows]) == 0
        steps_ahead = np.diff(positions[rows])
        rows = rows[np.concatenate(([True], ~is_same | (steps_ahead > 0)))]
        begins = np.concatenate(([True], (np.diff(sequences[rows]) != 0) | (np.diff(positions[rows]) != 1)))
        starts = np.flatnonzero(begins)
        is_prompt = positions[rows] < np.array(self.prompt_lengths)[sequences[rows]]
        return RoutingTrace.from_arrays(
            metadata,
            experts_TLk=self.experts_NLk[rows],
            weights_TLk=self.weights_NLk[rows],
            sequence_lengths_S=np.diff(starts, append=len(rows)),
            phase_T=np.where(is_prompt, PREFILL, DECODE).astype(np.uint8),
            positions_T=positions[rows],
            token_ids_T=None if self.token_ids_N is None else self.token_ids_N[rows],
            steps_T=steps[rows],
            hidden={layer: states_NH[rows] for layer, states_NH in self.hidden.items()},
            where="recording",
        )


@dataclass(slots=True)
class _Step:
    """A step: what it routed belongs to `columns` once it has ended."""

    columns: _Columns
    number: int
    spans: list[RowSpan]
    sequences_S: list[int]
    """Number of each span's sequence."""
    num_rows: int
    rows: slice | Int64Array
    """Those of the step that belong to somebody."""
    experts_LTk: list[Int64Array] = field(default_factory=list)
    """Choices of the layers so far, not copied yet, padding included."""
    weights_LTk: list[Float32Array] = field(default_factory=list)


class RoutingRecorder:
    """A StepObserver that keeps every computed token's experts and gate weights, until `max_tokens` of them.

    When no room is left for a whole step it stops by itself: what has been recorded stays as it is. Positions that a
    sequence computed twice are kept once. `start`, `stop`, `take_trace` and the properties may be called from any
    thread.

    Args:
        observers: of the engine to watch.
        metadata: of the traces; `hidden_size` must be set if there are `hidden_layers`.
    """

    def __init__(self, observers: StepObservers, metadata: TraceMetadata, options: RecordingOptions) -> None:
        self._observers = observers
        self._metadata = metadata
        self._options = options
        self._lock = threading.Lock()
        self._columns: _Columns | None = _Columns(metadata, options)
        self._step: _Step | None = None
        self._sequence_of: dict[str, int] = {}
        self.num_tokens = 0
        self.num_steps = 0
        self.is_full = False
        self.error: str | None = None
        """Why recording ended early."""

    def start(self) -> None:
        """Record from the next step on."""
        self._observers.add(self)

    def stop(self) -> None:
        """Record no more; a step that is under way may still be."""
        self._observers.remove(self)

    def take_trace(self) -> RoutingTrace:
        """Hand over the recording, in sequences of consecutive positions. The recorder keeps nothing of it.

        Where positions of a sequence are missing (its beginning lay in shared pages, or recording began later) the
        rest is a sequence of its own, so that the row before is always the token before.

        Raises: ValueError if there is nothing to take.
        """
        self.stop()
        with self._lock:  # a step that ends now comes whole or not at all
            columns, self._columns = self._columns, None
        if columns is None or not columns.num_rows:
            raise ValueError("a recording must hold at least one token to become a trace, got none")
        return columns.to_trace(self._metadata)

    # -- in the generation thread ----------------------------------------------------------------------------------

    def begin_step(self, spans: list[RowSpan]) -> None:
        columns, self._step = self._columns, None
        if columns is None:
            return
        num_rows = sum([span.num_rows for span in spans])
        if columns.num_rows + num_rows > self._options.max_tokens:
            self.is_full = True
            self.stop()
            return
        sequences_S = [self._number(columns, span.sequence) for span in spans]
        self._step = _Step(columns, columns.num_steps, spans, sequences_S, num_rows, rows_in(spans))

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array) -> None:
        step = self._step
        if step is None:
            return
        if experts_Tk.shape[1] != self._metadata.top_k:
            self.error = f"layer {layer} has {experts_Tk.shape[1]} experts per token, others {self._metadata.top_k}"
            self._step = None
            self.stop()
            return
        assert layer == len(step.experts_LTk)
        step.experts_LTk.append(experts_Tk)
        step.weights_LTk.append(weights_Tk)
        if layer in step.columns.hidden:
            rows = step.rows
            states_TH = hidden_TH[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(hidden_TH.device)]
            states_TH = states_TH.to(torch.float16).clamp(-_MAX_FLOAT16, _MAX_FLOAT16)
            start = step.columns.num_rows
            step.columns.hidden[layer][start : start + step.num_rows] = states_TH.cpu().numpy()

    def end_step(self) -> None:
        step, self._step = self._step, None
        if step is None or len(step.experts_LTk) < self._metadata.num_layers:
            return
        with self._lock:
            if step.columns is self._columns:
                step.columns.add(step)
                self.num_tokens, self.num_steps = step.columns.num_rows, step.columns.num_steps

    def forget(self, request_id: str) -> None:
        """A later request of the same name is another sequence."""
        self._sequence_of.pop(request_id, None)

    def _number(self, columns: _Columns, sequence: RoutedSequence) -> int:
        number = self._sequence_of.get(sequence.request_id)
        if number is None:
            number = self._sequence_of[sequence.request_id] = len(columns.prompt_lengths)
            columns.prompt_lengths.append(sequence.num_prompt_tokens)
        return number


def _expert_dtype(num_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)
