"""The tokens that engines will compute in the time to come: all of them, as foresight knows them, or those expected.

How many steps there will be is estimated by the last ones' duration.

Shapes: C cells (functions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray, IntArray
from moeless.simulate.batching import Batch


@dataclass(slots=True)
class _Engine:
    """Capacity that an engine has left."""

    prompt_budget: int
    """Tokens of prompts in one of its steps."""
    is_busy: NDArray[np.bool_]
    """True for each possible step that the engine takes."""
    prompt_tokens: int = 0
    """Number of tokens of prompts ahead of the next prompt."""

    @property
    def num_steps(self) -> int:
        return len(self.is_busy)


TokensOf = Callable[[int, int, int, int], FloatArray | IntArray]
"""Tokens per function, shape (C,), of a part of a request: its number, the first position, how many tokens, and how
many tokens of the request are computed by now."""


def upcoming_load(
    tokens_of: TokensOf,
    batches: Sequence[Batch],
    arriving: Sequence[tuple[int, float]],
    *,
    left: Sequence[IntArray],
    steps: Sequence[int],
    prompt_tokens_R: IntArray,
    output_tokens_R: IntArray,
    max_batch_tokens: int,
    num_cells: int,
) -> tuple[FloatArray, int]:
    """Tokens per function, shape (C,), and the engine steps that they take, at least 1.

    Args:
        batches: of the engines.
        arriving: requests that will come, in their order, and when, as a share of the time.
        left: tokens to come of each engine's decoding requests, true or expected.
        steps: that each engine is expected to make.
        output_tokens_R: true or expected.
    """
    load_C = np.zeros(num_cells)
    engines = []

    def decode(engine: _Engine, request: int, position: int, left: int, first_step: int, computed: int) -> None:
        nonlocal load_C
        num_tokens = min(left, engine.num_steps - first_step)
        if num_tokens > 0:
            load_C += tokens_of(request, position, num_tokens, computed)
            engine.is_busy[first_step : first_step + num_tokens] = True

    def prefill(engine: _Engine, request: int, done: int) -> None:
        nonlocal load_C
        prompt = int(prompt_tokens_R[request])
        num_tokens = min(prompt - done, engine.num_steps * engine.prompt_budget - engine.prompt_tokens)
        if num_tokens > 0:
            load_C += tokens_of(request, done, num_tokens, done)
            first_step = engine.prompt_tokens // engine.prompt_budget
            engine.prompt_tokens += num_tokens
            next_step = -(-engine.prompt_tokens // engine.prompt_budget)
            engine.is_busy[first_step:next_step] = True
            if done + num_tokens == prompt:
                decode(engine, request, prompt, int(output_tokens_R[request]) - 1, next_step, done)

    for batch, left_n, num_steps in zip(batches, left, steps, strict=True):
        budget = max(1, max_batch_tokens - len(batch.requests_n))
        engine = _Engine(budget, np.zeros(num_steps, dtype=np.bool_))
        engines.append(engine)
        for request, position, to_come in zip(
            batch.requests_n.tolist(), batch.positions_n.tolist(), left_n.tolist(), strict=True
        ):
            decode(engine, request, position, to_come, 0, position)
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
