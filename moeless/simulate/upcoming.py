"""The tokens that engines will compute in the time to come: what foresight knows.

The routing is the true one; how many steps there will be is estimated by the last ones' duration.

Shapes: C cells (functions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray, IntArray
from moeless.simulate.batching import Batch
from moeless.simulate.forecasts import SpanCounts


@dataclass(slots=True)
class _Engine:
    """What an engine can still take."""

    prompt_budget: int
    """Tokens of prompts in one of its steps."""
    is_busy: NDArray[np.bool_]
    """Whether it makes each of the steps that it has time for."""
    prompt_tokens: int = 0
    """The next prompt comes behind so many tokens."""

    @property
    def num_steps(self) -> int:
        return len(self.is_busy)


def upcoming_load(
    spans: SpanCounts,
    batches: Sequence[Batch],
    arriving: Sequence[tuple[int, float]],
    *,
    steps: Sequence[int],
    sequences_R: IntArray,
    prompt_tokens_R: IntArray,
    output_tokens_R: IntArray,
    max_batch_tokens: int,
    num_cells: int,
) -> tuple[FloatArray, int]:
    """Tokens per function, shape (C,), and the engine steps that they take, at least 1.

    Args:
        batches: of the engines.
        arriving: requests that will come, in their order, and when, as a share of the time.
        steps: that each engine is expected to make.
    """
    load_C = np.zeros(num_cells)
    engines = []

    def decode(engine: _Engine, request: int, position: int, left: int, first_step: int) -> None:
        nonlocal load_C
        num_tokens = min(left, engine.num_steps - first_step)
        if num_tokens > 0:
            load_C += spans.of_span(int(sequences_R[request]), position, num_tokens)
            engine.is_busy[first_step : first_step + num_tokens] = True

    def prefill(engine: _Engine, request: int, done: int) -> None:
        nonlocal load_C
        prompt = int(prompt_tokens_R[request])
        num_tokens = min(prompt - done, engine.num_steps * engine.prompt_budget - engine.prompt_tokens)
        if num_tokens > 0:
            load_C += spans.of_span(int(sequences_R[request]), done, num_tokens)
            first_step = engine.prompt_tokens // engine.prompt_budget
            engine.prompt_tokens += num_tokens
            next_step = -(-engine.prompt_tokens // engine.prompt_budget)
            engine.is_busy[first_step:next_step] = True
            if done + num_tokens == prompt:
                decode(engine, request, prompt, int(output_tokens_R[request]) - 1, next_step)

    for batch, num_steps in zip(batches, steps, strict=True):
        budget = max(1, max_batch_tokens - len(batch.requests_n))
        engine = _Engine(budget, np.zeros(num_steps, dtype=np.bool_))
        engines.append(engine)
        for request, position, left in zip(
            batch.requests_n.tolist(), batch.positions_n.tolist(), batch.left_n.tolist(), strict=True
        ):
            decode(engine, request, position, left, 0)
        for request, done in batch.prefilling:
            prefill(engine, request, done)
        for request in batch.waiting:
            if engine.prompt_tokens >= engine.num_steps * engine.prompt_budget:
                break
            prefill(engine, request, 0)
    for request, when in arriving:
        engine = min(engines, key=lambda engine: engine.prompt_tokens)
        arrival_step = int(when * engine.num_steps)
        engine.prompt_tokens = max(engine.prompt_tokens, arrival_step * engine.prompt_budget)
        prefill(engine, request, 0)
    return load_C, max(1, sum(int(engine.is_busy.sum()) for engine in engines))
