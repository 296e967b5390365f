"""Records the routing of what an engine computes, as a trace for moeless_predictors.

RoutingRecorder is the observer that copies rows while the model runs; recordings.py starts and stops it for servers.
Memory is reserved once, for a number of rows; the system hands it out page by page as rows come.

Shapes: N rows recorded, T rows of a step, L MoE layers, k experts per token, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless.core.errors import RequestError
from moeless.core.recording import RecordingOptions
from moeless.dispatch.wire import FloatArray
from moeless.engine.observing import RowSpan, StepObservers, rows_in
from moeless.engine.sequence import Sequence
from moeless.functions.pool import IntArray
from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace, TraceMetadata

_MAX_FLOAT16 = 65504.0


def row_bytes(metadata: TraceMetadata, options: RecordingOptions) -> int:
    """Bytes that one recorded row takes in memory."""
    per_choice = _expert_dtype(metadata.num_experts).itemsize + 2
    hidden = 2 * len(options.hidden_layers) * (metadata.hidden_size or 0)
    span_and_token = 4 * 4 + (4 if options.token_ids else 0)  # at most as many spans as rows
    return metadata.num_layers * metadata.top_k * per_choice + hidden + span_and_token


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
    """The rows so far, in the order in which they were computed; the first `num_rows` never change again."""

    def __init__(self, metadata: TraceMetadata, options: RecordingOptions) -> None:
        n, choices = options.max_tokens, (metadata.num_layers, metadata.top_k)
        self.experts_NLk = np.empty((n, *choices), dtype=_expert_dtype(metadata.num_experts))
        self.weights_NLk = np.empty((n, *choices), dtype=np.float16)
        self.token_ids_N = np.empty(n, dtype=np.int32) if options.token_ids else None
        self.spans_N4 = np.empty((n, 4), dtype=np.int32)
        """Whose the rows are, span by span: sequence, first position, number of rows, step."""
        self.hidden: dict[int, NDArray[np.float16]] = {
            layer: np.empty((n, metadata.hidden_size or 0), dtype=np.float16) for layer in options.hidden_layers
        }
        self.num_rows = 0
        self.num_spans = 0
        self.prompt_lengths: list[int] = []
        """By sequence."""


@dataclass(slots=True)
class _OpenStep:
    """A step that is being computed: its rows are behind those that `columns` has, and count once it has ended."""

    columns: _Columns
    experts_TLk: IntArray
    """Where they go in `columns`."""
    weights_TLk: NDArray[np.float16]
    rows: slice | IntArray
    """Those of the step that belong to somebody."""
    num_spans: int
    num_layers_seen: int = 0


class RoutingRecorder:
    """A StepObserver that keeps every computed token's experts and gate weights, until `max_tokens` of them.

    When no room is left for a whole step it stops by itself: what has been recorded stays as it is. Positions that a
    sequence computed twice are kept once. `start`, `stop`, `take_trace` and the properties may be called from any
    thread.

    Args:
        observers: of the engine to watch.
        metadata: of the traces; `hidden_size` must be set if `hidden_layers` are asked for.
    """

    def __init__(self, observers: StepObservers, metadata: TraceMetadata, options: RecordingOptions) -> None:
        self._observers = observers
        self._metadata = metadata
        self._options = options
        self._columns: _Columns | None = _Columns(metadata, options)
        self._step: _OpenStep | None = None
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
        """What was recorded, in sequences of consecutive positions. The recorder has stopped and let go of it then.

        Where positions of a sequence are missing (its beginning lay in shared pages, or recording began later) the
        rest is a sequence of its own, so that the row before is always the token before.

        Raises: ValueError if there is nothing to take.
        """
        self.stop()
        columns, self._columns = self._columns, None
        if columns is None or not columns.num_rows:
            raise ValueError("a recording must hold at least one token to become a trace, got none")
        return _to_trace(columns, self._metadata)

    # -- in the generation thread ----------------------------------------------------------------------------------

    def begin_step(self, spans: list[RowSpan]) -> None:
        columns, self._step = self._columns, None
        if columns is None:
            return
        # One list and one copy: what is called once a step finds nothing of itself in the processor's caches.
        found = [(self._number(columns, s.sequence), s.first_position, s.num_rows, self.num_steps) for s in spans]
        num_rows = sum([span.num_rows for span in spans])
        start, stop = columns.num_rows, columns.num_rows + num_rows
        if stop > self._options.max_tokens:
            self.is_full = True
            self.stop()
            return
        columns.spans_N4[columns.num_spans : columns.num_spans + len(spans)] = found
        if columns.token_ids_N is not None:
            ids = [i for span in spans for i in span.sequence.token_ids(span.first_position, span.num_rows)]
            columns.token_ids_N[start:stop] = ids
        self._step = _OpenStep(
            columns,
            columns.experts_NLk[start:stop],
            columns.weights_NLk[start:stop],
            rows_in(spans),
            len(spans),
        )

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: IntArray, weights_Tk: FloatArray) -> None:
        step = self._step
        if step is None:
            return
        if experts_Tk.shape[1] != self._metadata.top_k:
            self.error = f"layer {layer} has {experts_Tk.shape[1]} experts per token, others {self._metadata.top_k}"
            self._step = None
            self.stop()
            return
        rows = step.rows
        step.experts_TLk[:, layer] = experts_Tk[rows]
        step.weights_TLk[:, layer] = weights_Tk[rows]
        if layer in step.columns.hidden:
            states_TH = hidden_TH[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(hidden_TH.device)]
            states_TH = states_TH.to(torch.float16).clamp(-_MAX_FLOAT16, _MAX_FLOAT16)
            start = step.columns.num_rows
            step.columns.hidden[layer][start : start + len(states_TH)] = states_TH.cpu().numpy()
        step.num_layers_seen += 1

    def end_step(self) -> None:
        step, self._step = self._step, None
        if step is not None and step.num_layers_seen == self._metadata.num_layers:
            step.columns.num_spans += step.num_spans
            step.columns.num_rows += len(step.experts_TLk)
            self.num_tokens = step.columns.num_rows
            self.num_steps += 1

    def forget(self, request_id: str) -> None:
        """A later request of the same name is another sequence."""
        self._sequence_of.pop(request_id, None)

    def _number(self, columns: _Columns, sequence: Sequence) -> int:
        number = self._sequence_of.get(sequence.request_id)
        if number is None:
            number = self._sequence_of[sequence.request_id] = len(columns.prompt_lengths)
            columns.prompt_lengths.append(sequence.num_prompt_tokens)
        return number


def _to_trace(columns: _Columns, metadata: TraceMetadata) -> RoutingTrace:
    """Sort the rows by sequence and position, each position once, and cut the sequences at their gaps."""
    spans_S4 = columns.spans_N4[: columns.num_spans].astype(np.int64)
    lengths_S = spans_S4[:, 2]
    sequences, firsts, _, steps = np.repeat(spans_S4, lengths_S, axis=0).T
    ends_S = np.cumsum(lengths_S)
    positions = firsts + np.arange(ends_S[-1]) - np.repeat(ends_S - lengths_S, lengths_S)
    rows = np.lexsort((positions, sequences))  # stable: of a position that was computed twice, the first comes first
    is_same = np.diff(sequences[rows]) == 0
    steps_ahead = np.diff(positions[rows])
    rows = rows[np.concatenate(([True], ~is_same | (steps_ahead > 0)))]
    begins = np.concatenate(([True], (np.diff(sequences[rows]) != 0) | (np.diff(positions[rows]) != 1)))
    starts = np.flatnonzero(begins)
    is_prompt = positions[rows] < np.array(columns.prompt_lengths)[sequences[rows]]
    return RoutingTrace.from_arrays(
        metadata,
        experts_TLk=columns.experts_NLk[rows],
        weights_TLk=columns.weights_NLk[rows],
        sequence_lengths_S=np.diff(starts, append=len(rows)),
        phase_T=np.where(is_prompt, PREFILL, DECODE).astype(np.uint8),
        positions_T=positions[rows],
        token_ids_T=None if columns.token_ids_N is None else columns.token_ids_N[rows],
        steps_T=steps[rows],
        hidden={layer: states_NH[rows] for layer, states_NH in columns.hidden.items()},
        where="recording",
    )


def _expert_dtype(num_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)
