"""Cost of forecasting each layer's load: microseconds a layer, and the share of a decode step.

`python -m benchmarks prediction_overhead` times the predictor by itself in the shapes of three models (a batch of 32,
the processor time of one thread), then a random model of 367 million parameters that decodes with its experts in
process, with and without forecasts, in turns whose order is drawn, so that whatever else slows the machine slows both.
Two ways: forecasts at every step (turns of one step; one in `LiveConfig.measure_every` is also measured, which costs
about as much again: both kinds are timed, and counted by their share), and kept to `LiveConfig.max_share` as a server
does (turns of many steps, of which some have a forecast). Predictors are fitted to made-up routing for a moment only:
what they cost depends on their shape. Intervals are of 95 %, from a bootstrap over the pairs of turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks._models import random_model, random_prompts
from benchmarks.trace_overhead import NUM_RESAMPLES, PROMPT_LENGTH, Steps
from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.prediction import PredictionObserver
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.live import LiveConfig, LivePredictor
from moeless_predictors.live_features import StepRows
from moeless_predictors.predictor_set import KINDS, PredictorSet
from moeless_predictors.traces.synthetic import synthetic_trace

BATCH = 32
PAST_TOKENS = 64
"""Decoded before the clock starts, so that each sequence has a past."""
STEPS_A_TURN = 40
"""Enough for some forecasts within the share of the time, few enough for the machine to stay as it is."""
NEVER = 10**9
Value = TypeVar("Value", float, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a model, as far as predicting is concerned."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int


SHAPES = (
    Shape(name="gpt-oss-20b", num_layers=24, num_experts=32, top_k=4, hidden_size=2880),
    Shape(name="deepseek-v2-lite", num_layers=26, num_experts=64, top_k=6, hidden_size=2048),
    Shape(name="deepseek-v3", num_layers=58, num_experts=256, top_k=8, hidden_size=7168),
)
SERVED = Shape(name="367m", num_layers=8, num_experts=16, top_k=2, hidden_size=512)


@dataclass(frozen=True, kw_only=True)
class LayerFigure:
    """Microseconds a layer: median over the steps of the whole step's time / L."""

    shape: str
    kind: str
    plain_us: float
    measured_us: float
    """Time of a step whose accuracy is measured, too."""
    mean_us: float
    """Both, by their share."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Median over pairs of turns, with forecasts / without, less 1."""

    pairs: int
    overhead: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class StepFigure:
    """Figures of one kind and batch."""

    kind: str
    batch: int
    step_ms: float
    every_step: Overhead
    kept: Overhead
    """To its share of the time."""
    followed: float
    """Share of the steps that then have a forecast."""


def main(argv: list[str] | None = None) -> None:
    """Print two tables; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="*", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=200, help="steps for each shape and kind")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of steps for each kind and batch")
    parser.add_argument("--turns", type=int, default=40, help="pairs of turns within the share of the time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to keep the random model; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few steps, and the two smaller shapes")
    arguments = parser.parse_args(argv)
    num_steps, num_pairs, num_turns = arguments.steps, arguments.pairs, arguments.turns
    if arguments.quick:
        num_steps, num_pairs, num_turns = 40, 40, 4
    wanted: list[str] = arguments.shapes or [shape.name for shape in (SHAPES[:2] if arguments.quick else SHAPES)]
    torch.set_num_threads(1)
    shapes = [shape for shape in SHAPES if shape.name in wanted]
    layer_figures = [time_layers(shape, kind, num_steps) for shape in shapes for kind in arguments.kinds]
    show_layers(layer_figures)
    step_figures = []
    if arguments.batches:
        with random_model(SERVED.name, arguments.folder) as model:
            served = model.by_moeless(torch.float32)
            for kind in arguments.kinds:
                predictors = quickly_fitted(SERVED, kind)
                step_figures += [
                    measure(served, predictors, kind, batch, num_pairs, num_turns, threads=arguments.threads)
                    for batch in arguments.batches
                ]
        show_steps(step_figures)
    if arguments.json:
        figures = {
            "layers": [asdict(figure) for figure in layer_figures],
            "steps": [asdict(figure) for figure in step_figures],
        }
        arguments.json.write_text(json.dumps(figures, indent=2))


def quickly_fitted(shape: Shape, kind: str) -> PredictorSet:
    """Predictors of the shape and kind that `moeless predict fit` would make, hardly trained."""
    trace = synthetic_trace(
        num_sequences=3,
        tokens_per_sequence=32,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size if kind == "gate" else None,
    )
    config = FitConfig(
        kinds=(kind,),
        distances=(1,),
        history={"epochs": 1, "min_steps": 1},
        gate_threshold=0.0,
        batch_sizes=(1, 8, 32),
        validation_share=0.34,
    )
    return fit_predictors(trace, config)


def live_predictor(predictors: PredictorSet, *, measure_every: int, max_share: float = 1.0) -> LivePredictor:
    """One that is never switched off, however badly it does."""
    return LivePredictor(predictors, LiveConfig(max_share=max_share, measure_every=measure_every, window=NEVER))


def time_layers(shape: Shape, kind: str, num_steps: int) -> LayerFigure:
    """Forecast a decoding batch, by itself."""
    trace = synthetic_trace(
        num_sequences=BATCH,
        tokens_per_sequence=PAST_TOKENS,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        seed=1,
    )
    experts_LSNk, weights_LSNk = (
        np.ascontiguousarray(
            np.moveaxis(array.reshape(BATCH, PAST_TOKENS, shape.num_layers, shape.top_k), 2, 0), dtype=dtype
        )
        for array, dtype in ((trace.experts_TLk, np.int64), (trace.weights_TLk, np.float32))
    )
    hidden_TH = torch.randn(BATCH, shape.hidden_size)
    predictors = quickly_fitted(shape, kind)
    medians = []
    for measure_every in (NEVER, 1):
        live = live_predictor(predictors, measure_every=measure_every)
        took_us = []
        for step in range(PAST_TOKENS + num_steps):
            rows = [StepRows(str(sequence), 1, step) for sequence in range(BATCH)]
            experts_LSk = experts_LSNk[:, :, step % PAST_TOKENS].copy()
            weights_LSk = weights_LSNk[:, :, step % PAST_TOKENS].copy()
            started = time.thread_time_ns()
            live.begin_step(rows)
            for layer in range(shape.num_layers):
                live.observe(layer, experts_LSk[layer], weights_LSk[layer], lambda: hidden_TH)
            live.end_step()
            took_us.append((time.thread_time_ns() - started) / 1e3 / shape.num_layers)
        medians.append(statistics.median(took_us[PAST_TOKENS:]))
    plain_us, measured_us = medians
    return LayerFigure(
        shape=shape.name,
        kind=kind,
        plain_us=plain_us,
        measured_us=measured_us,
        mean_us=_by_share(plain_us, measured_us),
    )


class _Switch:
    """Lets a predictor watch the steps between `start` and `stop`.

    It takes a sequence's watched steps for consecutive ones: else those in between would cost it its past, which is
    most of what there is to do.
    """

    def __init__(self, observers: StepObservers, live: LivePredictor) -> None:
        self._observers = observers
        self._observer = _WithoutGaps(live)

    def start(self) -> None:
        self._observers.add(self._observer)

    def stop(self) -> None:
        self._observers.remove(self._observer)


class _WithoutGaps(PredictionObserver):
    def __init__(self, live: LivePredictor) -> None:
        super().__init__(live)
        self._num_seen: dict[str, int] = {}

    def begin_step(self, spans: list[RowSpan]) -> None:
        seen, moved = self._num_seen, []
        for span in spans:
            position = seen.get(span.sequence.request_id, span.sequence.num_prompt_tokens)
            moved.append(span._replace(first_position=position))
            seen[span.sequence.request_id] = position + span.num_rows
        super().begin_step(moved)


def measure(
    model: Any, predictors: PredictorSet, kind: str, batch: int, num_pairs: int, num_turns: int, *, threads: int
) -> StepFigure:
    """Decode until there are enough pairs of steps, plain and measured, and of turns within the share."""
    plain_P2, measured_P2 = (
        _pairs(model, live_predictor(predictors, measure_every=every), batch, num_pairs, threads=threads)
        for every in (NEVER, 1)
    )
    config = LiveConfig()
    live = live_predictor(predictors, measure_every=config.measure_every, max_share=config.max_share)
    kept_P2 = _pairs(model, live, batch, num_turns, threads=threads, steps_a_turn=STEPS_A_TURN)
    random = np.random.default_rng(0)
    medians_M3 = [
        [
            _ratio(pairs_P2[random.integers(0, len(pairs_P2), len(pairs_P2))])
            for pairs_P2 in (plain_P2, measured_P2, kept_P2)
        ]
        for _ in range(NUM_RESAMPLES)
    ]
    plain_M, measured_M, kept_M = np.array(medians_M3).T
    return StepFigure(
        kind=kind,
        batch=batch,
        step_ms=float(np.median(np.concatenate((plain_P2, measured_P2))[:, 0])) * 1e3,
        every_step=Overhead(
            pairs=num_pairs,
            overhead=_by_share(_ratio(plain_P2), _ratio(measured_P2)),
            interval=_interval(_by_share(plain_M, measured_M)),
        ),
        kept=Overhead(pairs=num_turns, overhead=_ratio(kept_P2), interval=_interval(kept_M)),
        followed=live.accuracy()[0].num_forecasts / live.num_steps,
    )


def _pairs(
    model: Any, live: LivePredictor, batch: int, num_pairs: int, *, threads: int, steps_a_turn: int = 1
) -> NDArray[np.float64]:
    """Seconds a step without and with forecasts, shape (pairs, 2)."""
    steps = Steps(model, partial(_Switch, live=live), threads=threads, steps_a_turn=steps_a_turn)
    prompts = random_prompts(batch, PROMPT_LENGTH, steps.vocab_size)
    try:
        steps.run(prompts)  # pages and caches are warm then
        steps.pairs.clear()
        while len(steps.pairs) < num_pairs:
            steps.run(prompts)
    finally:
        steps.close()
    return np.array(steps.pairs[:num_pairs])


def _ratio(pairs_P2: NDArray[np.float64]) -> float:
    return float(np.median(pairs_P2[:, 1] / pairs_P2[:, 0])) - 1


def _interval(medians_M: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(medians_M, [0.025, 0.975])
    return float(low), float(high)


def _by_share(plain: Value, measured: Value) -> Value:
    """The mean over steps of which one in `measure_every` is measured."""
    every = LiveConfig().measure_every
    return (plain * (every - 1) + measured) / every


def show_layers(figures: list[LayerFigure]) -> None:
    """A row for each shape and kind."""
    table = Table("shape", "kind", "µs a layer", "measured step", "mean", title=f"forecasting a batch of {BATCH}")
    for figure in figures:
        times = (f"{value:.0f}" for value in (figure.plain_us, figure.measured_us, figure.mean_us))
        table.add_row(figure.shape, figure.kind, *times)
    Console().print(table)


def show_steps(figures: list[StepFigure]) -> None:
    """A row for each kind and batch."""
    columns = ("kind", "batch", "step", "every step", "95 %", "kept to its share", "95 %", "steps with a forecast")
    table = Table(*columns, title=f"forecasts in a decode step of the {SERVED.name} model")
    for figure in figures:
        cells: list[str] = []
        for found in (figure.every_step, figure.kept):
            cells += (f"{found.overhead:+.1%}", f"{found.interval[0]:+.1%} to {found.interval[1]:+.1%}")
        table.add_row(
            figure.kind,
            str(figure.batch),
            f"{figure.step_ms:.2f} ms",
            *cells,
            f"{figure.followed:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
