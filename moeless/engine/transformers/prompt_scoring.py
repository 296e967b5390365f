"""Log-probabilities of prompt tokens, from the hidden states that a forward pass computes anyway.

A model's forward gives logits for the tokens to be sampled only; those of a whole prompt would be its length times the
vocabulary. So the last hidden states are kept, and the model's own output layer (with whatever it does to logits) is
applied to a few rows at a time: by the model's forward, its decoder replaced by one that returns those rows.

Shapes: R rows of a forward pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeless.core.generation import GenerationDelta
from moeless.engine.observing import RowSpan
from moeless.engine.transformers.sampling import raw_logprobs

_MAX_ROWS = 64
"""Rows whose logits exist at a time: 150,000 tokens in float32 are 40 MB."""


class PromptScorer:
    """Scores the prompt tokens of the sequences that want it. Belongs to the generation thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        decoder = model.base_model
        if decoder is model:
            decoder = model.get_decoder()
        self._decoder: Any = None if decoder is model else decoder

    @property
    def obstacle(self) -> str | None:
        """Why prompts of this model cannot be scored, or None if they can."""
        return None if self._decoder is not None else f"{type(self._model).__name__} has no decoder of its own"

    @contextmanager
    def watch(self, spans: Sequence[RowSpan], emit: Callable[[GenerationDelta], None]) -> Iterator[None]:
        """Wrap one forward pass that computes `spans`, and pass on what it says about their prompts, piece by piece."""
        scored: list[tuple[Any, RowSpan]] = [(span.sequence, span) for span in spans]
        scored = [(sequence, span) for sequence, span in scored if sequence.scores_prompt]
        if not scored:
            yield
            return
        outputs: list[Any] = []
        handle = self._decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            yield
        finally:
            handle.remove()
        for sequence, span in scored:
            try:
                for delta in self._score(sequence, span, outputs[0]):
                    emit(delta)
            except Exception as error:  # one sequence's fault must not fail the whole batch
                sequence.fail(error)

    def _score(self, sequence: Any, span: RowSpan, output: Any) -> Iterator[GenerationDelta]:
        hidden_RH: Tensor = output.last_hidden_state.flatten(0, 1)
        stop = min(span.first_position + span.num_rows + 1, sequence.num_prompt_tokens)
        for first in range(sequence.next_scored, stop, _MAX_ROWS):
            token_ids = sequence.prompt_token_ids[first : min(first + _MAX_ROWS, stop)]
            # The row of the token before gives the distribution of this one.
            row = span.first_row + first - 1 - span.first_position
            logits_RV = self._logits(output, hidden_RH[row : row + len(token_ids)])
            nums_top = [sequence.num_prompt_logprobs] * len(token_ids)
            yield sequence.take_scores(raw_logprobs(logits_RV, token_ids, nums_top))

    def _logits(self, output: Any, hidden_RH: Tensor) -> Tensor:
        """float32 logits of some rows, as the model's own forward makes them."""
        rows = dataclasses.replace(output, last_hidden_state=hidden_RH.unsqueeze(0))
        token_ids = torch.zeros(1, len(hidden_RH), dtype=torch.int64, device=hidden_RH.device)
        self._decoder.forward = lambda *_args, **_kwargs: rows
        try:
            logits: Tensor = self._model(input_ids=token_ids, use_cache=False).logits
        finally:
            del self._decoder.forward
        return logits[0].float()
