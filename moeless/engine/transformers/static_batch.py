"""The engine for models that the paged cache cannot hold: one left-padded batch with transformers' DynamicCache.

For attention with unlike key and value sizes (DeepSeek-V2 and V3), chunked or linear attention. Sequences that end
leave the batch and give their memory back. New ones are prefilled on their own and join the batch where its cache can
be padded; a cache with recurrent states cannot, and there new ones wait until the batch is empty.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moeless.core.errors import ConfigError
from moeless.core.generation import GenerationDelta
from moeless.engine.config import EngineConfig
from moeless.engine.observing import RowSpan
from moeless.engine.protocol import OnStep
from moeless.engine.transformers.experts import without_experts
from moeless.engine.transformers.rotary import SequenceRotary
from moeless.engine.transformers.sampling import sample
from moeless.engine.transformers.sequence import Sequence
from moeless.engine.transformers.threaded_engine import ThreadedEngine

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Batch:
    """Sequences that decode together. Row b of everything belongs to `sequences[b]`; W is the cache's width."""

    sequences: list[Sequence]
    lengths: list[int]
    """Tokens of each in the cache."""
    next_ids: list[int]
    """Sampled, but not in the cache yet."""
    cache: Any
    """The model's own Cache; None until its first forward pass made one."""
    mask_BW: Tensor
    """1 for tokens, 0 for the padding on the left."""

    @property
    def width(self) -> int:
        return self.mask_BW.shape[1]


class StaticBatchEngine(ThreadedEngine):
    """A batch that sequences join by prefill and leave one by one; no pages, no prefix sharing."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None
    ) -> None:
        super().__init__(model, tokenizer, config, on_step)
        self._waiting: deque[Sequence] = deque()
        self._batch: _Batch | None = None
        self._stepping: list[Sequence] = []
        self._capacity_tokens = 1
        self._joins_at_any_step = False
        self._takes_padding = False
        self._outgrown: deque[Sequence] = deque()
        """Sequences that have begun and are to be computed anew, with other rotary factors."""
        self._has_just_recomputed = False
        self._rotary = SequenceRotary(model)
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward_options: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep else {}

    def _open(self) -> None:
        token_bytes = self._probe_cache()
        device = self._model.device
        free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        budget = self._config.kv_budget_bytes(device_type=device.type, free_bytes=free_bytes)
        self._capacity_tokens = budget // token_bytes
        if self._capacity_tokens < 2:
            raise ConfigError(f"kv_cache_bytes must hold at least two tokens of {token_bytes} bytes, got {budget}")
        self._limit_context_to(self._capacity_tokens)
        self._rotary.install()
        logger.info(
            "static batching ready capacity_tokens=%d max_running=%d joins_at_any_step=%s",
            self._capacity_tokens,
            self._config.max_running,
            self._joins_at_any_step,
        )

    def _close(self) -> None:
        self._rotary.remove()
        self._batch = None
        self._waiting.clear()
        self._outgrown.clear()

    def run_to_end(self, sequences: list[Sequence]) -> None:
        """Generate from `sequences` in the caller's thread, for a check; the engine is used up afterwards.

        An error of a step is raised.
        """
        self._open()
        try:
            self._waiting.extend(sequences)
            while self._has_work():
                self._step()
                self._deliver()
        finally:
            self._close()

    def _add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._outgrown:
            self._outgrown.remove(sequence)
        elif self._batch is not None and sequence in self._batch.sequences:
            self._keep([s is not sequence for s in self._batch.sequences])

    def _has_work(self) -> bool:
        return bool(self._waiting or self._outgrown) or self._batch is not None

    def _step(self) -> None:
        joining = self._pick_joining()
        self._stepping = joining
        if joining:
            batch, logits_BV = self._prefill(joining)
            self._accept(batch, logits_BV)
        else:
            assert self._batch is not None
            self._stepping = self._batch.sequences
            logits_BV = self._decode(self._batch)
            batch, self._batch = self._batch, None
            self._accept(batch, logits_BV)

    def _recover(self) -> Iterable[Sequence]:
        stepping, self._stepping = self._stepping, []
        if self._batch is not None and any(sequence in self._batch.sequences for sequence in stepping):
            self._batch = None
        return [sequence for sequence in stepping if sequence.finish_reason is None]

    def _num_running(self) -> int:
        batch = self._batch
        return len(self._outgrown) + (0 if batch is None else len(batch.sequences))

    def _kv_usage(self) -> float:
        batch = self._batch
        return 0.0 if batch is None else min(1.0, len(batch.sequences) * batch.width / self._capacity_tokens)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _pick_joining(self) -> list[Sequence]:
        """Take the sequences off the queues that begin now, or begin again.

        Those that begin again come first, but never twice in a row: with dynamic NTK they do at each token, and the
        others must decode and begin too.
        """
        has_just_recomputed, self._has_just_recomputed = self._has_just_recomputed, False
        if self._batch is not None and (has_just_recomputed or not self._joins_at_any_step):
            return []
        if has_just_recomputed and self._waiting:
            return self._take_from(self._waiting)
        joining = self._take_from(self._outgrown)
        self._has_just_recomputed = bool(joining)
        return joining or self._take_from(self._waiting)

    def _take_from(self, queue: deque[Sequence]) -> list[Sequence]:
        """Take sequences off a queue: as many as memory and one step's tokens allow."""
        running = [] if self._batch is None else self._batch.sequences
        longest = max((s.num_prompt_tokens + s.max_tokens for s in running), default=0)
        joining: list[Sequence] = []
        widest = 0
        while queue and len(running) + len(joining) < self._config.max_running:
            sequence = queue[0]
            if joining and not self._takes_padding and sequence.num_tokens != widest:
                break
            longest = max(longest, sequence.num_prompt_tokens + sequence.max_tokens)
            widest = max(widest, sequence.num_tokens)
            count = len(joining) + 1
            if (len(running) + count) * longest > self._capacity_tokens:
                break
            if joining and count * widest > self._config.max_batch_tokens:
                break
            joining.append(queue.popleft())
        return joining

    def _prefill(self, sequences: list[Sequence]) -> tuple[_Batch, Tensor]:
        lengths = [sequence.num_tokens for sequence in sequences]
        width = max(lengths)
        ids_BW = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask_BW = torch.zeros(len(sequences), width, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            # Padding is masked, but 0 x NaN is NaN: a token of the sequence's own cannot harm it more than it does.
            ids_BW[row] = sequence.prompt_token_ids[0]
            ids_BW[row, width - lengths[row] :] = torch.tensor(sequence.token_ids(0, lengths[row]))
            mask_BW[row, width - lengths[row] :] = 1
        device = self._model.device
        mask_BW = mask_BW.to(device)
        batch = _Batch(list(sequences), lengths, [], None, mask_BW)
        positions_BW = (mask_BW.cumsum(dim=-1) - 1).clamp_(min=0)
        return batch, self._forward(batch, ids_BW.to(device), positions_BW)

    def _decode(self, batch: _Batch) -> Tensor:
        device = self._model.device
        ids_B1 = torch.tensor(batch.next_ids, device=device).unsqueeze(1)
        positions_B1 = torch.tensor(batch.lengths, device=device).unsqueeze(1)
        batch.mask_BW = pad(batch.mask_BW, (0, 1), value=1)
        batch.lengths = [length + 1 for length in batch.lengths]
        return self._forward(batch, ids_B1, positions_B1)

    def _forward(self, batch: _Batch, ids: Tensor, positions: Tensor) -> Tensor:
        """Returns: float32 logits of each row's last token, (B, V)."""
        is_scored = any(sequence.scores_prompt for sequence in batch.sequences)
        scored = _row_spans(batch, ids.shape[1]) if is_scored else []
        with (
            self.observers.step(lambda: _row_spans(batch, ids.shape[1])),
            self._rotary.lengths(lambda: np.array(batch.lengths, dtype=np.int64)[:, None], ids.device),
            self._scorer.watch(scored, self._emit),
        ):
            return self._compute(batch, ids, positions)

    def _emit(self, delta: GenerationDelta) -> None:
        """Deliver at once: a long prompt's log-probabilities need not all be held."""
        self._outbox.append(delta)
        self._deliver()

    def _compute(self, batch: _Batch, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=batch.mask_BW,
            position_ids=positions,
            past_key_values=batch.cache,
            use_cache=True,
            **self._forward_options,
        )
        batch.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _accept(self, batch: _Batch, logits_BV: Tensor) -> None:
        """Sample for every row of a batch that has just been computed, and merge what goes on into the running one."""
        sampled = sample(logits_BV, [sequence.sampler for sequence in batch.sequences], self._vocabulary)
        batch.next_ids = sampled.token_ids
        keep: list[bool] = []
        outgrown: list[Sequence] = []
        for row, sequence in enumerate(batch.sequences):
            ended = sequence.take(sampled, row)
            changes = self._rotary.changes_at(sequence.num_tokens)  # the cache holds what other factors rotated
            if changes and not ended:
                outgrown.append(sequence)
            keep.append(not (ended or changes))
            self._outbox.append(sequence.take_delta())
        running, self._batch = self._batch, batch
        if running is not None:  # a merge that fails half-way spoils both
            self._stepping = [*running.sequences, *batch.sequences]
        if not all(keep):
            self._keep(keep)
        if running is not None:
            self._batch = running if self._batch is None else _merge(running, self._batch)
        self._outgrown.extend(outgrown)

    def _keep(self, keep: list[bool]) -> None:
        """Reduce the batch to the rows marked, and cut the padding that all of them share."""
        assert self._batch is not None
        batch = self._batch
        rows = [row for row, kept in enumerate(keep) if kept]
        if not rows:
            self._batch = None
            return
        index = torch.tensor(rows, device=batch.mask_BW.device)
        _select_rows(batch.cache, index)
        batch.mask_BW = batch.mask_BW[index]
        batch.sequences = [batch.sequences[row] for row in rows]
        batch.lengths = [batch.lengths[row] for row in rows]
        batch.next_ids = [batch.next_ids[row] for row in rows]
        if batch.width > max(batch.lengths) and self._joins_at_any_step:
            _set_width(batch, max(batch.lengths))

    def _probe_cache(self) -> int:
        """Find out what kind of cache the model makes, and its bytes for each token of a sequence."""
        sizes: list[int] = []
        for num_tokens in (8, 16):
            batch = _Batch([], [], [], None, torch.ones(1, num_tokens, dtype=torch.int64, device=self._model.device))
            positions = torch.arange(num_tokens, device=self._model.device).unsqueeze(0)
            with without_experts(self._model):
                self._compute(batch, torch.zeros_like(positions), positions)
            self._joins_at_any_step = _can_be_padded(batch.cache)
            # A cache class of a model's own (MiniMax's) may count padding as tokens: there, prompts of one length only.
            self._takes_padding = type(batch.cache) is DynamicCache
            layers: list[Any] = batch.cache.layers
            held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
            sizes.append(sum(tensor.nbytes for tensor in held if tensor is not None))
        return max(1, (sizes[1] - sizes[0]) // 8)


def _row_spans(batch: _Batch, width: int) -> list[RowSpan]:
    """Name the owners of the rows in a forward pass of `width` tokens per sequence; padding is on the left."""
    spans = []
    for row, (sequence, length) in enumerate(zip(batch.sequences, batch.lengths, strict=True)):
        num_rows = min(width, length)
        spans.append(RowSpan(sequence, (row + 1) * width - num_rows, num_rows, length - num_rows))
    return spans


def _can_be_padded(cache: Cache) -> bool:
    """True if every layer's cache is keys and values by position, and nothing else."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def _select_rows(cache: Cache, index: Tensor) -> None:
    """Keep some rows. `reorder_cache` does that for every kind of layer, `batch_select_indices` forgets recurrent
    states; a cache class with states of its own brings its own `batch_select_indices`."""
    if type(cache).batch_select_indices is Cache.batch_select_indices:
        cache.reorder_cache(index)
    else:
        cache.batch_select_indices(index)
    positions = getattr(cache, "position_ids", None)
    if positions is not None:  # Qwen4's model keeps its tokens' positions, (3, B, W), beside the layers
        cache.position_ids = positions[:, index]


def _set_width(batch: _Batch, width: int) -> None:
    """Pad a batch's cache on the left, or cut its padding."""
    change = width - batch.width
    for layer in batch.cache.layers:
        num_kept = width
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += change
            num_kept = min(width, layer.sliding_window - 1)
        change_here = num_kept - layer.keys.shape[-2]
        # A negative padding cuts.
        layer.keys = pad(layer.keys, (0, 0, change_here, 0))
        layer.values = pad(layer.values, (0, 0, change_here, 0))
    batch.mask_BW = pad(batch.mask_BW, (change, 0))


def _merge(first: _Batch, second: _Batch) -> _Batch:
    """One batch of both, the narrower padded to the wider."""
    width = max(first.width, second.width)
    for batch in (first, second):
        if batch.width != width:
            _set_width(batch, width)
    for ours, theirs in zip(first.cache.layers, second.cache.layers, strict=True):
        ours.keys = torch.cat([ours.keys, theirs.keys])
        ours.values = torch.cat([ours.values, theirs.values])
    return _Batch(
        first.sequences + second.sequences,
        first.lengths + second.lengths,
        first.next_ids + second.next_ids,
        first.cache,
        torch.cat([first.mask_BW, second.mask_BW]),
    )
