"""Sampling state of one sequence: its parameters, its position, and the tokens it has seen."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless.core.generation import SamplingParams
from moeless.engine.transformers.randomness import stream_of


class RowSampler:
    """One row of a batch. Belongs to the generation thread."""

    __slots__ = (
        "_bias",
        "_ending_ids",
        "_frequency",
        "_min_tokens",
        "_presence",
        "_prompt",
        "_repetition",
        "_seen",
        "adjusts_logits",
        "is_plain_greedy",
        "min_p",
        "num_logprobs",
        "position",
        "stream",
        "temperature",
        "top_k",
        "top_p",
    )

    def __init__(
        self, params: SamplingParams, *, prompt: Sequence[int] = (), ending_ids: Iterable[int] = frozenset()
    ) -> None:
        """Args:
        prompt: the repetition penalty counts its tokens.
        ending_ids: tokens that end the sequence, which `min_tokens` keeps from being sampled.
        """
        self.temperature = params.temperature
        self.top_k = params.top_k
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.num_logprobs = params.logprobs
        self.stream = stream_of(secrets.randbits(64) if params.seed is None else params.seed)
        self.position = 0
        """Index of the token to be sampled, 0 for the first generated one."""
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._repetition = params.repetition_penalty
        self._prompt: Sequence[int] = prompt if self._repetition != 1 else ()
        has_penalty = self._repetition != 1 or self._presence != 0 or self._frequency != 0
        self._seen: _TokenCounts | None = _TokenCounts() if has_penalty else None
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), dtype=torch.int64),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32),
            )
        self._min_tokens = params.min_tokens
        self._ending_ids = torch.tensor(sorted(ending_ids) if self._min_tokens else [], dtype=torch.int64)
        self.adjusts_logits = has_penalty or self._bias is not None or self._ending_ids.numel() > 0
        self.is_plain_greedy = self.temperature == 0 and not self.adjusts_logits and self.num_logprobs is None

    def commit(self, token_id: int) -> None:
        """Note that `token_id` was generated at the current position."""
        self.position += 1
        if self._seen is not None:
            self._seen.add(token_id)

    def adjust(self, logits_V: Tensor) -> None:
        """Apply logit bias, `min_tokens` and the penalties, in place.

        The repetition penalty as CTRL's (Keskar et al. 2019) and transformers' over prompt and output; then OpenAI's
        penalties over the output: presence x [generated before] + frequency x times generated.
        """
        device = logits_V.device
        if self._bias is not None:
            token_ids, bias = self._bias
            logits_V.index_add_(0, token_ids.to(device), bias.to(device))
        if self.position < self._min_tokens:
            logits_V.index_fill_(0, self._ending_ids.to(device), float("-inf"))
        if self._seen is None:
            return
        if self._prompt:
            self._seen.add_uncounted(self._prompt)
            self._prompt = ()
        token_ids_n, counts_n = self._seen.arrays()
        if not len(token_ids_n):
            return
        index = torch.from_numpy(token_ids_n).to(device)
        values = logits_V[index]
        if self._repetition != 1:
            values = torch.where(values > 0, values / self._repetition, values * self._repetition)
        penalty = counts_n * self._frequency + (counts_n > 0) * np.float32(self._presence)
        values -= torch.from_numpy(penalty.astype(np.float32, copy=False)).to(device)
        logits_V[index] = values


class _TokenCounts:
    """Distinct tokens in the order of their first appearance, and how often each was generated."""

    __slots__ = ("_counts", "_rows", "_token_ids")

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._token_ids = np.empty(16, dtype=np.int64)
        self._counts = np.empty(16, dtype=np.float32)

    def add(self, token_id: int) -> None:
        row = self._row_of(token_id)
        self._counts[row] += 1

    def add_uncounted(self, token_ids: Iterable[int]) -> None:
        """Tokens that have appeared but were not generated."""
        for token_id in dict.fromkeys(token_ids):
            self._row_of(token_id)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids and counts; views."""
        num_rows = len(self._rows)
        return self._token_ids[:num_rows], self._counts[:num_rows]

    def _row_of(self, token_id: int) -> int:
        row = self._rows.get(token_id)
        if row is None:
            row = self._rows[token_id] = len(self._rows)
            if row == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._token_ids[row] = token_id
            self._counts[row] = 0
        return row
