"""The engine for models with a paged KV cache: transformers' continuous batching with our sampling and text."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from moeless.core.errors import ConfigError
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import OnStep
from moeless.engine.transformers.hooks import NO_MEMORY_CHECK, PagedBatcher, kv_bytes_per_token
from moeless.engine.transformers.sequence import Sequence
from moeless.engine.transformers.threaded_engine import ThreadedEngine

logger = logging.getLogger(__name__)


class ContinuousEngine(ThreadedEngine):
    """Requests join and leave the batch at every step; long prompts are prefilled in chunks beside decoding."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None
    ) -> None:
        super().__init__(model, tokenizer, config, on_step)
        self._batcher: PagedBatcher | None = None

    def _open(self) -> None:
        batching = ContinuousBatchingConfig(
            page_size=self._config.page_size,
            num_blocks=self._num_blocks(),
            max_batch_tokens=self._config.max_batch_tokens,
            max_requests_per_batch=self._config.max_running,
            max_memory_percent=NO_MEMORY_CHECK,
            max_blocks_per_request=0,
            allow_block_sharing=self._config.prefix_sharing,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        self._batcher = PagedBatcher(self._model, batching, self.observers, self._vocabulary)
        self._limit_context_to(self._batcher.max_request_tokens)
        logger.info(
            "continuous batching ready pages=%d page_size=%d max_running=%d prefix_sharing=%s",
            self._batcher.num_blocks,
            self._config.page_size,
            self._config.max_running,
            self._batcher.shares_prefixes,
        )

    def _close(self) -> None:
        if self._batcher is not None:
            self._batcher.close()
            self._batcher = None

    def _add(self, sequence: Sequence) -> None:
        self._paged.add(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._paged.cancel(sequence.request_id)

    def _has_work(self) -> bool:
        return self._paged.has_work()

    def _step(self) -> None:
        self._outbox += self._paged.step()

    def _recover(self) -> Iterable[Sequence]:
        return self._paged.fail_batch()

    def _num_running(self) -> int:
        batcher = self._batcher
        return 0 if batcher is None else batcher.num_active

    def _kv_usage(self) -> float:
        batcher = self._batcher
        return 0.0 if batcher is None else min(1.0, max(0.0, 1.0 - batcher.free_share()))

    @property
    def _paged(self) -> PagedBatcher:
        assert self._batcher is not None
        return self._batcher

    def _num_blocks(self) -> int:
        device = self._model.device
        free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        budget = self._config.kv_budget_bytes(device_type=device.type, free_bytes=free_bytes)
        page_bytes = kv_bytes_per_token(self._model) * self._config.page_size
        pages_of_a_sequence = -(-self.max_context_tokens // self._config.page_size)
        num_blocks = min(budget // page_bytes, pages_of_a_sequence * self._config.max_running)
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes must hold at least one page of {self._config.page_size} tokens "
                f"({page_bytes} bytes), got {budget}"
            )
        return num_blocks
