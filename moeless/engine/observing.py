"""Passes each step's routing to observers, with the sequence that each row belongs to.

An engine opens a step and says which rows are whose; the dispatcher reports each MoE layer in it. All calls to
observers come from the generation thread. Without an observer nothing is computed or copied for it.

Shapes: T rows of hidden states in a step, k experts per row, H hidden.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # engine.protocol imports this module and loads no torch
    from torch import Tensor

    from moeless.core.arrays import BoolArray, Float32Array, Int64Array

logger = logging.getLogger(__name__)


class RoutedSequence(Protocol):
    """The part of an engine's sequence that observers read."""

    request_id: str
    num_prompt_tokens: int

    def token_ids(self, first: int, count: int) -> list[int]:
        """The tokens at positions `first` to `first + count`, of the prompt and what was generated after it."""
        ...


class RowSpan(NamedTuple):
    """Rows of a step's hidden states that are consecutive positions of one sequence. Rows in no span are padding.

    A tuple, because a step makes one for each sequence and a frozen dataclass takes more than twice as long.
    """

    sequence: RoutedSequence
    first_row: int
    num_rows: int
    first_position: int


class StepObserver(Protocol):
    """Called in the generation thread. One that raises is taken out, and generation goes on without it.

    A position may come more than once: a sequence that had to give its pages back is computed again. Positions whose
    keys and values were found in shared pages never come. A step that fails is never ended: the next one begins.
    """

    def begin_step(self, spans: list[RowSpan]) -> None:
        """A forward pass begins; `spans` are in row order."""
        ...

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array) -> None:
        """A MoE layer's input and what its gate chose, padding included.

        Nothing of it may be changed. The arrays may be kept, as nobody writes to them again; the hidden states may not.

        Called when the layer's work is on its way to the workers (or, in process, before it is computed) and before
        answers are collected: what an observer computes here overlaps the layer.
        """
        ...

    def end_step(self) -> None:
        """Every layer was computed."""
        ...

    def forget(self, request_id: str) -> None:
        """A sequence ended or was dropped, perhaps one that this observer never saw."""
        ...


class StepObservers:
    """The observers of one engine. `add` and `remove` may be called from any thread, the rest is the engine's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: tuple[StepObserver, ...] = ()
        self._watching: tuple[StepObserver, ...] = ()

    def add(self, observer: StepObserver) -> None:
        """Pass routing to `observer` from the next step on."""
        with self._lock:
            self._wanted = (*self._wanted, observer)

    def remove(self, observer: StepObserver) -> None:
        """Stop passing routing to `observer`, perhaps only after the current step. Unknown ones are ignored."""
        with self._lock:
            self._wanted = tuple(other for other in self._wanted if other is not observer)

    @property
    def is_watching(self) -> bool:
        """True inside a step that has observers: the dispatcher copies nothing otherwise."""
        return bool(self._watching)

    @contextmanager
    def step(self, find_spans: Callable[[], list[RowSpan]]) -> Iterator[None]:
        """Wrap one forward pass. `find_spans` is called only if there are observers."""
        if not self._wanted:
            yield
            return
        spans = find_spans()
        self._watching = self._wanted
        try:
            self._notify(lambda observer: observer.begin_step(spans))
            yield
            self._notify(lambda observer: observer.end_step())
        finally:
            self._watching = ()

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: Int64Array, weights_Tk: Float32Array) -> None:
        """Called by the dispatcher while `is_watching`.

        Rows that are not finite, of a sequence that will fail, are shown as zeros: they must spoil neither a recording
        nor what is forecast for the others.
        """
        is_finite_T: BoolArray = np.logical_and.reduce(np.isfinite(weights_Tk), axis=-1)
        if not is_finite_T.all():
            weights_Tk = np.where(is_finite_T[:, None], weights_Tk, np.zeros_like(weights_Tk))
            hidden_TH = hidden_TH.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        for observer in self._watching:
            try:
                observer.observe_layer(layer, hidden_TH, experts_Tk, weights_Tk)
            except Exception:
                self._take_out(observer)

    def forget(self, request_ids: list[str]) -> None:
        """These sequences ended or were dropped."""

        def forget_all(observer: StepObserver) -> None:
            for request_id in request_ids:
                observer.forget(request_id)

        for observer in self._wanted:
            self._guard(observer, forget_all)

    def _notify(self, call: Callable[[StepObserver], None]) -> None:
        for observer in self._watching:
            self._guard(observer, call)

    def _guard(self, observer: StepObserver, call: Callable[[StepObserver], None]) -> None:
        try:
            call(observer)
        except Exception:
            self._take_out(observer)

    def _take_out(self, observer: StepObserver) -> None:
        """Remove an observer that raised: its fault must not stop generation."""
        logger.exception("observer taken out observer=%s", type(observer).__name__)
        self.remove(observer)
        self._watching = tuple(other for other in self._watching if other is not observer)


def rows_in(spans: list[RowSpan]) -> slice | Int64Array:
    """The rows that the spans hold, padding between them left out."""
    first, last = spans[0], spans[-1]
    num_rows = sum([span.num_rows for span in spans])
    if last.first_row + last.num_rows - first.first_row == num_rows:
        return slice(first.first_row, first.first_row + num_rows)
    return np.concatenate([np.arange(span.first_row, span.first_row + span.num_rows) for span in spans])
