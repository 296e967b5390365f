"""Continuous batching as engine/transformers/continuous.py does it.

Every running sequence decodes one token a step, and what is left of the step's budget goes to prompts, first come,
first served, in chunks.

Shapes: R requests, n tokens decoded in a step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import IntArray
from moeless.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchingConfig:
    """Limits of each engine's batch; names and defaults are those of engine.config.EngineConfig."""

    max_batch_tokens: int = 512
    max_running: int = 64

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ConfigError(f"engine.max_running must be at least 1, got {self.max_running}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"engine.max_batch_tokens must be at least max_running ({self.max_running}), "
                f"got {self.max_batch_tokens}"
            )


class Chunk(NamedTuple):
    """A part of a prompt."""

    request: int
    first: int
    num_tokens: int


class Step(NamedTuple):
    """Tokens that a step computes."""

    requests_n: IntArray
    """Requests that decode a token each."""
    positions_n: IntArray
    """And the position of that token."""
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        return len(self.requests_n) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def decode_context(self) -> float:
        """Sum of the decoded tokens' positions."""
        return float(self.positions_n.sum())

    @property
    def prefill_context(self) -> float:
        """Sum of the prompt tokens' positions."""
        return float(sum(c.num_tokens * (c.first + (c.num_tokens - 1) / 2) for c in self.chunks))


class Batch:
    """The requests of one engine.

    Args:
        prompt_tokens_R, output_tokens_R: of all requests, at least 1 each. The first output token comes with the
            prompt's last chunk, so a request computes prompt + output - 1 tokens.
    """

    def __init__(self, config: BatchingConfig, prompt_tokens_R: IntArray, output_tokens_R: IntArray) -> None:
        self._config = config
        self._prompt_R, self._output_R = prompt_tokens_R, output_tokens_R
        self.waiting: deque[int] = deque()
        self.prefilling: deque[tuple[int, int]] = deque()
        """Requests and how many tokens of their prompts are done."""
        self.requests_n: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Those that decode, with the position of the next token and how many are to come."""
        self.positions_n: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.left_n: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @property
    def num_requests(self) -> int:
        """Running and waiting."""
        return len(self.waiting) + len(self.prefilling) + len(self.requests_n)

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.requests_n)

    def add(self, request: int) -> None:
        """Put a request that has come behind the others."""
        self.waiting.append(request)

    def begin_step(self) -> Step | None:
        """Choose the tokens of the next step; None if there are none."""
        if not self.num_requests:
            return None
        chunks = []
        budget = self._config.max_batch_tokens - len(self.requests_n)
        for request, done in self.prefilling:
            if budget <= 0:
                break
            chunks.append(Chunk(request, done, min(budget, int(self._prompt_R[request]) - done)))
            budget -= chunks[-1].num_tokens
        while budget > 0 and self.waiting and self.num_running < self._config.max_running:
            request = self.waiting.popleft()
            self.prefilling.append((request, 0))
            chunks.append(Chunk(request, 0, min(budget, int(self._prompt_R[request]))))
            budget -= chunks[-1].num_tokens
        return Step(self.requests_n, self.positions_n, chunks)

    def end_step(self, step: Step) -> tuple[list[int], list[int]]:
        """Returns: requests that got their first token, and those that got their last."""
        started: list[int] = []
        finished: list[int] = []
        if len(self.requests_n):
            self.positions_n, self.left_n = self.positions_n + 1, self.left_n - 1
            if not self.left_n.all():
                stays = self.left_n > 0
                finished += self.requests_n[~stays].tolist()
                self.requests_n, self.positions_n = self.requests_n[stays], self.positions_n[stays]
                self.left_n = self.left_n[stays]
        for chunk in step.chunks:
            request, done = self.prefilling.popleft()
            assert (request, done) == chunk[:2]
            if done + chunk.num_tokens < self._prompt_R[request]:
                self.prefilling.appendleft((request, done + chunk.num_tokens))  # the last chunk: the budget is spent
            else:
                started.append(request)
        going_on = [request for request in started if self._output_R[request] > 1]
        finished += [request for request in started if self._output_R[request] == 1]
        if going_on:
            joined = np.array(going_on, dtype=np.int64)
            self.requests_n = np.concatenate([self.requests_n, joined])
            self.positions_n = np.concatenate([self.positions_n, self._prompt_R[joined]])
            self.left_n = np.concatenate([self.left_n, self._output_R[joined] - 1])
        return started, finished
