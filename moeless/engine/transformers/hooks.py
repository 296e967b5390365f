"""The one place that reaches into transformers' continuous batching, and what it relies on there (5.19).

- `ContinuousBatchingManager.__init__` resolves configs and calls `switch_to_cb_friendly_attn`;
  `_create_batch_processor` builds cache, scheduler and processor without starting a thread.
- `ContinuousBatchProcessor.prepare_next_batch`, `_generation_step(model)` and `update_batch` are one step. The
  processor calls `model_runner.compute_batch`, and `output_router.deliver_batch` at most once a step.
- `ModelRunner._sample(scores, output_ids)` gets float32 logits of shape (1, rows, V) whose first rows belong, in
  order, to those of `inputs_and_outputs.requests_in_batch` that have `has_new_token`; the rest is padding. Tokens go
  to `output_ids[0, :rows]`.
- `update_batch` calls `RequestState.update_and_check_completion(token, logprob)`, frees the request's pages at once
  if that returns True, and passes what `to_generation_output()` returns to the router.
- A request that must make room is soft reset: `create_equivalent_initial_request` makes its successor.
- `PagedAttentionCache.search_prefix_match(request_id, prompt)` returns the tokens it found in shared pages;
  `count_new_complete_blocks(state, request_len)` decides which pages can be found later, none if it is empty.
- A request with status PREFILLING in `active_requests`, no blocks and `position_offset` 0 is prefilled from its start.

tests/unit/engine/transformers/test_hooks.py fails, naming the line above, when transformers changes one of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from moeless.core.generation import GenerationDelta
from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.transformers.paged_attention import NAME as ATTENTION
from moeless.engine.transformers.paged_attention import SpanPlan, plan_attention, register_attention
from moeless.engine.transformers.prompt_scoring import PromptScorer
from moeless.engine.transformers.rotary import SequenceRotary
from moeless.engine.transformers.sampling import Sampled, Vocabulary, sample
from moeless.engine.transformers.sequence import Sequence

__all__ = ["NO_MEMORY_CHECK", "PagedBatcher", "SequenceState", "kv_bytes_per_token"]

NO_MEMORY_CHECK = 1000.0
"""For `max_memory_percent`: transformers' estimate counts masks and copies that our attention does not make."""


@dataclass
class SequenceState(RequestState):  # type: ignore[misc]
    """transformers' bookkeeping of a request, with the decisions left to our `Sequence`."""

    sequence: Sequence | None = None
    sampled: Sampled | None = None
    """Tokens that the step sampled for its rows."""
    row: int = 0
    """The request's row of `sampled`."""

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceState:
        return cls(
            request_id=sequence.request_id,
            initial_tokens=sequence.prompt_token_ids,
            max_new_tokens=sequence.max_tokens,
            streaming=True,
            sequence=sequence,
        )

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:  # noqa: ARG002
        assert self.sequence is not None
        self.generated_tokens.append(token_id)
        assert self.sampled is not None
        ended = self.sequence.take(self.sampled, self.row)
        self.sampled = None
        if ended:
            self.status = RequestStatus.FINISHED
            return True
        self.tokens_to_process = [token_id]
        return False

    def to_generation_output(self) -> GenerationDelta:
        assert self.sequence is not None
        return self.sequence.take_delta()

    def create_equivalent_initial_request(self) -> SequenceState:
        return SequenceState(
            request_id=self.request_id,
            initial_tokens=self.initial_tokens + self.generated_tokens,
            max_new_tokens=None if self.max_new_tokens is None else self.max_new_tokens - len(self.generated_tokens),
            streaming=True,
            sequence=self.sequence,
        )


class _SamplingRunner(ModelRunner):  # type: ignore[misc]
    """Samples with our sampler, each row with its sequence's own parameters; passes rows' sequences to observers."""

    observers: StepObservers
    vocabulary: Vocabulary | None
    rotary: SequenceRotary
    scorer: PromptScorer
    scored: list[GenerationDelta]
    """Deltas of prompt tokens, for `PagedBatcher.step` to return."""

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        ios = self.inputs_and_outputs
        spans = [
            SpanPlan(f.state.request_id, f.state.position_offset - f.query_length, f.query_length)
            for f in ios.requests_in_batch
        ]
        batch_data["moeless_plan"] = [
            plan_attention(spans, allocator, dtype=ios.model_dtype, device=ios.device)
            for allocator in self.cache.cache_allocators.values()
        ]
        if ios.compute_stream is not None:
            # The inputs, and our plan, were made on the current stream; the model runs on its own.
            ios.compute_stream.wait_stream(torch.cuda.current_stream(ios.device))
        is_scored = any(f.state.sequence.scores_prompt for f in ios.requests_in_batch)
        spans_scored = self._row_spans() if is_scored else []
        with (
            self.observers.step(self._row_spans),
            self.rotary.lengths(self._lengths_1W, ios.device),
            self.scorer.watch(spans_scored, self.scored.append),
        ):
            super().compute_batch(model, batch_data)
            if is_scored and ios.compute_stream is not None:
                torch.cuda.current_stream(ios.device).wait_stream(ios.compute_stream)

    def _lengths_1W(self) -> NDArray[np.int64]:
        """For each position of the step, the tokens of its sequence, those included that are yet to be computed."""
        futures = self.inputs_and_outputs.requests_in_batch
        lengths = [future.state.sequence.num_tokens for future in futures]
        return np.repeat(np.array(lengths, dtype=np.int64), [future.query_length for future in futures])[None]

    def _row_spans(self) -> list[RowSpan]:
        spans, row = [], 0
        for future in self.inputs_and_outputs.requests_in_batch:
            state, num_rows = future.state, future.query_length
            spans.append(RowSpan(state.sequence, row, num_rows, state.position_offset - num_rows))
            row += num_rows
        return spans

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        states = [f.state for f in self.inputs_and_outputs.requests_in_batch if f.has_new_token]
        if not states:
            return
        rows = [state.sequence.sampler for state in states]
        sampled = sample(scores[0, : len(rows)], rows, self.vocabulary)
        output_ids[0, : len(rows)].copy_(torch.tensor(sampled.token_ids))
        for row, state in enumerate(states):
            state.sampled, state.row = sampled, row
        for row in sampled.errors:
            # What such a request left in its pages must not be found by a prompt that begins alike.
            self.cache.free_blocks(states[row].request_id, no_cache=True)


class _DeltaRouter(OutputRouter):  # type: ignore[misc]
    """Keeps a step's outputs, which are deltas, for `PagedBatcher.step` to return."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas: list[GenerationDelta] = []

    def deliver_batch(self, outputs: list[GenerationDelta]) -> None:
        self.deltas = outputs

    def take(self) -> list[GenerationDelta]:
        deltas, self.deltas = self.deltas, []
        return deltas


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' wiring of the parts, with our attention and without its thread."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:  # noqa: ARG002
        model.set_attn_implementation(ATTENTION)


class PagedBatcher:
    """transformers' continuous batching, driven step by step by the caller's thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ContinuousBatchingConfig,
        observers: StepObservers | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Args:
        model: gets our attention, and its own back at `close`.
        config: with `num_blocks`, `page_size`, `max_batch_tokens` and `max_requests_per_batch` set.
        observers: called at each step.
        """
        register_attention()
        self._model: Any = model
        self._rotary = SequenceRotary(model)
        self._original_attention: str = model.config._attn_implementation
        self._router = _DeltaRouter()
        self._batch: list[Any] | None = None
        try:
            self._processor = self._create_processor(config, observers or StepObservers(), vocabulary)
        except BaseException:
            self.close()
            raise
        self._scheduler: Any = self._processor.scheduler
        self._cache: PagedAttentionCache = self._processor.cache
        self._cache.extend_read_and_write_indices = self._extend_write_indices
        self._note_cached_tokens()
        self._share_short_prefixes_only()
        self._rotary.install()

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of one request that the pages can hold."""
        return int(infer_max_single_request_tokens(self._cache))

    @property
    def num_active(self) -> int:
        return len(self._scheduler.active_requests)

    @property
    def num_blocks(self) -> int:
        return int(self._cache.num_blocks)

    @property
    def shares_prefixes(self) -> bool:
        return bool(self._cache.use_prefix_sharing)

    def has_work(self) -> bool:
        return bool(self._scheduler.has_pending_requests())

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add_waiting_request(SequenceState.of(sequence))

    def cancel(self, request_id: str) -> None:
        self._scheduler.set_request_cancellation(request_id)
        self._scheduler.clear_cancelled_requests()

    def step(self) -> list[GenerationDelta]:
        """One forward pass over what the scheduler picks. Returns its deltas."""
        self._batch = None
        if not self._processor.prepare_next_batch():
            return []
        self._batch = [future.state for future in self._processor.inputs_and_outputs.requests_in_batch]
        self._processor._generation_step(self._model)
        self._processor.update_batch()
        if self._rotary.depends_on_length:
            self._recompute_outgrown(self._batch)
        return self._take_scored() + self._router.take()

    def fail_batch(self) -> list[Sequence]:
        """Forget what took part in a step that raised and free its pages. Requests beside it go on.

        If the step failed before it had a batch, that is every request that has begun (or, if none has, that waits).
        """
        states = self._batch
        if states is None:
            scheduler = self._scheduler
            states = list(scheduler.active_requests.values()) or list(scheduler.waiting_requests.values())
        for state in states:
            self.cancel(state.request_id)
        self._router.take()
        self._take_scored()
        self._scheduler._requests_to_fork.clear()
        self._scheduler.block_new_requests = False
        return [state.sequence for state in states]

    def _take_scored(self) -> list[GenerationDelta]:
        runner = self._processor.model_runner
        scored, runner.scored = runner.scored, []
        return cast("list[GenerationDelta]", scored)

    def free_share(self) -> float:
        """Share of the pages that no request holds. May be called from any thread."""
        cached = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in self._cache.cache_allocators.values()
        )
        total = self._cache.num_sectors * self._cache.bytes_per_sector
        return float(self._cache.compute_free_capacity() + cached / total)

    def close(self) -> None:
        self._rotary.remove()
        self._model.set_attn_implementation(self._original_attention)

    def _create_processor(
        self, config: ContinuousBatchingConfig, observers: StepObservers, vocabulary: Vocabulary | None
    ) -> ContinuousBatchProcessor:
        manager = _Manager(self._model, GenerationConfig(do_sample=False), config)
        manager.output_router = self._router
        processor: ContinuousBatchProcessor = manager._create_batch_processor()
        processor.model_runner = _SamplingRunner(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            cache=processor.cache,
            inputs_and_outputs=processor.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        processor.model_runner.observers = observers
        processor.model_runner.vocabulary = vocabulary
        processor.model_runner.rotary = self._rotary
        processor.model_runner.scorer = PromptScorer(self._model)
        processor.model_runner.scored = []
        return processor

    def _extend_write_indices(
        self,
        request_id: str,
        past: int,
        length: int,
        read_index: Any,  # noqa: ARG002
        write_index: list[list[int]],
    ) -> None:
        """Instead of the cache's own: our attention plans its reads by pages, not by a list of every token."""
        for allocator, indices in zip(self._cache.cache_allocators.values(), write_index, strict=True):
            indices.extend(allocator.get_write_indices(request_id, past, length))

    def _note_cached_tokens(self) -> None:
        """Tell each sequence how many prompt tokens it found in shared pages when it began."""
        search: Callable[[str, list[int]], int] = self._cache.search_prefix_match

        def search_and_note(request_id: str, prompt_ids: list[int]) -> int:
            state = self._scheduler.waiting_requests.get(request_id)
            if state is not None and state.sequence.scores_prompt:
                return 0  # what is found is not computed, and so cannot be scored
            found = search(request_id, prompt_ids)
            if found and state is not None and state.sequence.num_generated == 0:
                state.sequence.num_cached_tokens = found
            return found

        self._cache.search_prefix_match = search_and_note

    def _share_short_prefixes_only(self) -> None:
        """Share pages with short sequences only, if rotary factors depend on length."""
        if not self._rotary.depends_on_length:
            return
        search: Callable[[str, list[int]], int] = self._cache.search_prefix_match
        count: Callable[[SequenceState, int], dict[str, int]] = self._cache.count_new_complete_blocks

        def search_if_short(request_id: str, token_ids: list[int]) -> int:
            return search(request_id, token_ids) if self._rotary.factors_of(len(token_ids)) == 0 else 0

        def count_if_short(state: SequenceState, request_len: int) -> dict[str, int]:
            assert state.sequence is not None
            return count(state, request_len) if self._rotary.factors_of(state.sequence.num_tokens) == 0 else {}

        self._cache.search_prefix_match = search_if_short
        self._cache.count_new_complete_blocks = count_if_short

    def _recompute_outgrown(self, states: list[Any]) -> None:
        """Let sequences begin again whose new token changes their rotary factors: their pages hold the former ones.

        What they have generated is prefilled like a prompt. They keep their place among the running ones, unless
        they are computed anew for each token: then they queue up behind the ones that wait, which would never begin.
        """
        for state in states:
            is_decoding = state.status == RequestStatus.DECODING and state.generated_tokens
            if not is_decoding or not self._rotary.changes_at(state.sequence.num_tokens):
                continue
            self._cache.free_blocks(state.request_id)
            successor = state.create_equivalent_initial_request()
            if self._rotary.changes_with_every_token:
                del self._scheduler.active_requests[state.request_id]
                self._scheduler.add_waiting_request(successor)
                self._scheduler.block_new_requests = False  # set until a running one ends, and there may be none now
            else:
                successor.status = RequestStatus.PREFILLING
                self._scheduler.active_requests[state.request_id] = successor


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token in every layer of the paged cache."""
    config: Any = model.config.get_text_config()
    dtype: torch.dtype = model.dtype
    return int(2 * find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize * config.num_hidden_layers)
