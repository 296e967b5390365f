"""Cost of recording a routing trace in a decode step.

`python -m benchmarks trace_overhead` decodes batches with the continuous engine, its experts in process, and records
sixteen steps of every thirty-two, before or after the others as drawn, so that whatever else slows the machine slows
both. Sixteen is how often the recorder puts away what it has: each turn holds that cost once. Printed are the medians,
and the median of the pairs' ratios with the 95 % interval that a bootstrap over the pairs gives.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks._models import RandomModel, random_model, random_prompts, word_tokenizer
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.core.recording import RecordingOptions
from moeless.engine.config import EngineConfig
from moeless.engine.observing import StepObservers
from moeless.engine.routing_recorder import WRITE_EVERY, RoutingRecorder
from moeless.engine.transformers.build import build_engine
from moeless.packages.backbone import experts_modules
from moeless.packages.source import resolve_model
from moeless_predictors.traces import TraceMetadata

MODELS = ("moeless-mini", "367m")
PROMPT_LENGTH = 16
TOKENS = 192
"""Steps of each sequence in which the whole batch decodes; repeated as often as needed."""
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Figures of one model and batch; times of a step in milliseconds."""

    model: str
    batch: int
    pairs: int
    plain_ms: float
    recorded_ms: float
    overhead: float
    """Median over the pairs of recorded / plain, less 1."""
    interval: tuple[float, float]


def main(argv: list[str] | None = None) -> None:
    """Print a table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=150, help="pairs of turns for each model and batch")
    parser.add_argument("--hidden-layers", type=int, nargs="*", default=[], help="record these layers' inputs too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to keep the random models; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few pairs")
    arguments = parser.parse_args(argv)
    pairs = 10 if arguments.quick else arguments.pairs
    options = RecordingOptions(max_tokens=100_000, token_ids=True, hidden_layers=tuple(arguments.hidden_layers))
    torch.set_num_threads(1)  # the generation thread alone computes, with its own number
    figures = []
    for name in arguments.models:
        with stepping(name, threads=arguments.threads, folder=arguments.folder, options=options) as steps:
            figures += [measure(name, steps, batch, pairs) for batch in arguments.batches]
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2))


class Switch(Protocol):
    """Observer that is timed: it watches the steps between `start` and `stop`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


class Steps:
    """An engine whose decode steps are timed, watched or not as drawn.

    Args:
        new_switch: makes what watches, for each run.
        steps_a_turn: how many steps are watched, or not, before it is the other's turn.
    """

    def __init__(
        self, model: Any, new_switch: Callable[[StepObservers], Switch], *, threads: int, steps_a_turn: int = 1
    ) -> None:
        self.vocab_size: int = model.config.get_text_config().vocab_size
        config = EngineConfig(num_threads=threads, prefix_sharing=False, max_batch_tokens=1024, kv_cache_bytes=64 << 20)
        self._engine = build_engine(model, word_tokenizer(self.vocab_size), config, self._on_step)
        experts: Any = next(iter(experts_modules(model)))
        experts.moeless_dispatcher.set_observer(self._engine.observers)
        self.new_switch = new_switch
        self._switch = new_switch(self._engine.observers)
        self._random = np.random.default_rng(0)
        self._batch = 0
        self._left = 0
        self._done = threading.Event()
        self._order = [False, True]
        self._began_s = 0.0
        self._steps_a_turn = steps_a_turn
        self._turn_s: list[float] = []
        self._pair: dict[bool, float] = {}
        self.pairs: list[tuple[float, float]] = []
        self._engine.start()

    def run(self, prompts: list[list[int]]) -> None:
        """Decode a batch; appends to `pairs` (plain, watched) in seconds a step."""
        self._switch = self.new_switch(self._engine.observers)
        self._batch = self._left = len(prompts)
        self._done.clear()
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            self._engine.submit(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        self._done.wait()
        self._switch.stop()

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        """In the generation thread, after each step: note how long it took, and draw whether to watch the next."""
        took_s = time.perf_counter() - self._began_s
        is_whole = len(deltas) == self._batch and all(d.num_tokens == 1 and d.finish_reason is None for d in deltas)
        if is_whole and self._began_s:
            self._turn_s.append(took_s)
            if len(self._turn_s) == self._steps_a_turn:
                self._pair[self._order[len(self._pair)]] = sum(self._turn_s) / self._steps_a_turn
                self._turn_s = []
            if len(self._pair) == 2:
                self.pairs.append((self._pair[False], self._pair[True]))
                self._pair = {}
                self._random.shuffle(self._order)
        else:
            self._pair, self._turn_s = {}, []
        self._switch.stop()
        if self._order[len(self._pair)]:
            self._switch.start()
        self._left -= sum(delta.finish_reason is not None for delta in deltas)
        if self._left == 0:
            self._began_s = 0.0
            self._done.set()
        elif is_whole:
            self._began_s = time.perf_counter()

    def close(self) -> None:
        """End the generation thread."""
        self._engine.stop()


@contextmanager
def stepping(name: str, *, threads: int, folder: Path | None, options: RecordingOptions) -> Iterator[Steps]:
    """An engine over the model `name`."""
    with _model(name, folder) as model:
        manifest = model.packed.manifest
        metadata = TraceMetadata(
            model=name,
            num_experts=manifest.num_experts,
            top_k=manifest.top_k,
            num_layers=manifest.num_moe_layers,
            hidden_size=manifest.layers[0].layout.hidden_size,
        )
        steps = Steps(
            model.by_moeless(torch.float32),
            lambda observers: RoutingRecorder(observers, metadata, options),
            threads=threads,
            steps_a_turn=WRITE_EVERY,
        )
        try:
            yield steps
        finally:
            steps.close()


@contextmanager
def _model(name: str, folder: Path | None) -> Iterator[RandomModel]:
    if name == "moeless-mini":
        packed = resolve_model(name)
        yield RandomModel(packed.path, packed)
    else:
        with random_model(name, folder) as model:
            yield model


def measure(name: str, steps: Steps, batch: int, num_pairs: int) -> Figure:
    """Decode until there are enough pairs."""
    prompts = random_prompts(batch, PROMPT_LENGTH, steps.vocab_size)
    steps.run(prompts)  # pages and caches are warm then
    steps.pairs.clear()
    while len(steps.pairs) < num_pairs:
        steps.run(prompts)
    pairs_P2 = np.array(steps.pairs[:num_pairs])
    ratios_P = pairs_P2[:, 1] / pairs_P2[:, 0]
    low, high = _interval_of_median(ratios_P)
    plain, recorded = np.median(pairs_P2, axis=0) * 1e3
    return Figure(
        model=name,
        batch=batch,
        pairs=num_pairs,
        plain_ms=float(plain),
        recorded_ms=float(recorded),
        overhead=float(np.median(ratios_P)) - 1,
        interval=(low - 1, high - 1),
    )


def _interval_of_median(values_P: NDArray[np.float64]) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(0, len(values_P), (NUM_RESAMPLES, len(values_P)))
    low, high = np.quantile(np.median(values_P[draws], axis=1), [0.025, 0.975])
    return float(low), float(high)


def show(figures: list[Figure]) -> None:
    """A row for each model and batch."""
    table = Table("model", "batch", "step", "recorded", "overhead", "95 % interval", title="recording a routing trace")
    for figure in figures:
        table.add_row(
            figure.model,
            str(figure.batch),
            f"{figure.plain_ms:.2f} ms",
            f"{figure.recorded_ms:.2f} ms",
            f"{figure.overhead:+.1%}",
            f"{figure.interval[0]:+.1%} to {figure.interval[1]:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
