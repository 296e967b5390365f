"""The generation thread that both transformers engines share, with admission, delivery and failure around it."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from moeless.core.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
    RequestError,
)
from moeless.core.generation import GenerationDelta, GenerationRequest
from moeless.engine.config import EngineConfig
from moeless.engine.observing import StepObservers
from moeless.engine.protocol import EngineCounters, OnStep
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.prompt_scoring import PromptScorer
from moeless.engine.transformers.sampling import Vocabulary
from moeless.engine.transformers.sequence import Sequence, describe
from moeless.packages.context_length import limit_context

logger = logging.getLogger(__name__)


class ThreadedEngine(ABC):
    """Admission, the generation thread, delivery and failure; subclasses compute the steps.

    All torch work happens in the one thread: a second thread's OpenMP pool would spin against the first.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None
    ) -> None:
        self.observers = StepObservers()
        self._model = model
        self._config = config
        self._on_step = on_step
        self._texts = TokenTexts(tokenizer)
        self._eos_ids = eos_token_ids(model) | self._texts.eos_ids
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._scorer = PromptScorer(model)
        self._vocabulary = Vocabulary(self._texts.token_ids() | self._eos_ids, self._vocab_size)
        self.max_context_tokens = limit_context(model.config, config.max_model_len)

        self._lock = threading.Lock()
        self._live: dict[str, Sequence] = {}
        self._inbox: list[Sequence] = []
        self._cancelled: list[str] = []
        self._finish_times: deque[float] = deque(maxlen=32)
        self._outbox: list[GenerationDelta] = []
        self._wake = threading.Event()
        self._ready = threading.Event()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="moeless-generation", daemon=True)

    # -- any thread ------------------------------------------------------------------------------------------------

    def set_on_step(self, on_step: OnStep) -> None:
        if self._on_step is not None:
            raise ConfigError("on_step is already set")
        self._on_step = on_step

    def start(self) -> None:
        if self._on_step is None:
            raise ConfigError("on_step must be set before start")
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def is_alive(self) -> bool:
        return self._ready.is_set() and not self._stopping and self._failure is None

    def submit(self, request: GenerationRequest) -> None:
        self._check(request)
        sequence = Sequence(request, eos_ids=self._eos_ids, texts=self._texts)
        with self._lock:
            if not self.is_alive:
                raise EngineStoppedError("the engine is not running")
            if request.request_id in self._live:
                raise RequestError(f"request_id must be new, {request.request_id!r} is being generated")
            held = self._config.max_running + self._config.max_waiting
            if len(self._live) >= held:
                raise QueueFullError(
                    f"the engine holds {len(self._live)} requests, its limit (max_running + max_waiting)",
                    retry_after_s=self._retry_after_s(),
                )
            self._live[request.request_id] = sequence
            self._inbox.append(sequence)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id not in self._live:
                return
            self._cancelled.append(request_id)
        self._wake.set()

    def counters(self) -> EngineCounters:
        running = self._num_running()
        return EngineCounters(
            requests_running=running,
            requests_waiting=max(0, len(self._live) - running),
            kv_cache_usage=self._kv_usage(),
        )

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise RequestError("prompt must hold at least one token, got none", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError(f"prompt tokens must be in [0, {self._vocab_size}), got {min(prompt)} to {max(prompt)}")
        if sampling.prompt_logprobs is not None and self._scorer.obstacle is not None:
            raise RequestError(
                f"prompt_logprobs are not served for this model: {self._scorer.obstacle}", param="prompt_logprobs"
            )
        for field, token_ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token_id in token_ids:
                if not 0 <= token_id < self._vocab_size:
                    raise RequestError(
                        f"{field} tokens must be in [0, {self._vocab_size}), got {token_id}", param=field
                    )
        total = len(prompt) + sampling.max_tokens
        if total > self.max_context_tokens:
            raise ContextLengthError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({sampling.max_tokens}) make {total} tokens, "
                f"more than the context of {self.max_context_tokens}",
                param="max_tokens" if len(prompt) < self.max_context_tokens else "prompt",
                code="context_length_exceeded",
            )

    def _retry_after_s(self) -> float:
        """Mean seconds between the last ends of requests: about when the next place becomes free."""
        times = self._finish_times
        if len(times) < 2:
            return 1.0
        return min(60.0, max(1.0, math.ceil((times[-1] - times[0]) / (len(times) - 1))))

    def _limit_context_to(self, num_tokens: int) -> None:
        """Lower the context to the tokens that the KV memory holds.

        Raises: ConfigError if the user set a longer one.
        """
        if num_tokens >= self.max_context_tokens:
            return
        if self._config.max_model_len is not None:
            raise ConfigError(
                f"--max-model-len must be at most {num_tokens}, the tokens that the KV memory holds (--kv-cache-gb), "
                f"got {self._config.max_model_len}"
            )
        logger.warning("context limited by KV memory tokens=%d->%d", self.max_context_tokens, num_tokens)
        self.max_context_tokens = num_tokens

    # -- the generation thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._config.num_threads is not None:
                torch.set_num_threads(self._config.num_threads)
            if self._model.device.type == "cuda":
                torch.cuda.set_device(self._model.device)
            with torch.inference_mode():
                self._open()
                self._ready.set()
                self._loop()
        except Exception as error:
            logger.exception("generation thread failed error=%s", error)
            self._failure = error
        finally:
            with self._lock:
                self._stopping = True
                left, self._live, self._inbox = self._live, {}, []
            why = "the engine was stopped" if self._failure is None else f"the engine failed: {self._failure}"
            for sequence in left.values():
                sequence.finish("error", str(EngineStoppedError(why)))
                self._outbox.append(sequence.take_delta())
            self._deliver()
            self._close()
            self._ready.set()

    def _loop(self) -> None:
        while True:
            self._wake.clear()
            self._take_requests()
            if self._stopping:
                return
            if self._has_work():
                self._try_step()
            elif not self._outbox:
                self._wake.wait()
            self._deliver()

    def _take_requests(self) -> None:
        if not self._inbox and not self._cancelled:
            return
        with self._lock:
            arrived, self._inbox = self._inbox, []
            cancelled = [self._live[i] for i in self._cancelled if i in self._live]
            self._cancelled = []
        for sequence in arrived:
            self._add(sequence)
        for sequence in cancelled:
            if sequence.finish_reason is None:
                self._drop(sequence)
                sequence.finish("cancelled")
                self._outbox.append(sequence.take_delta())

    def _try_step(self) -> None:
        try:
            self._step()
        except Exception as error:
            failed = list(self._recover())
            logger.exception("step failed requests=%d error=%s", len(failed), error)
            for sequence in failed:
                if sequence.finish_reason is None:
                    sequence.finish("error", describe(error))
                self._outbox.append(sequence.take_delta())

    def _deliver(self) -> None:
        if not self._outbox:
            return
        deltas, self._outbox = self._outbox, []
        ended = [delta.request_id for delta in deltas if delta.finish_reason is not None]
        if ended:
            with self._lock:
                for request_id in ended:
                    self._live.pop(request_id, None)
                self._finish_times.extend([time.monotonic()] * len(ended))
            self.observers.forget(ended)
        assert self._on_step is not None
        try:
            self._on_step(deltas)
        except Exception:
            # The receiver's fault must not end the generation of everybody else.
            logger.exception("on_step failed deltas=%d", len(deltas))

    # -- what an implementation does, in the generation thread unless it says otherwise --------------------------------

    @abstractmethod
    def _open(self) -> None:
        """Allocate the KV memory, and pass the tokens that fit in it to `_limit_context_to`."""

    @abstractmethod
    def _close(self) -> None:
        """Free the KV memory; also called when `_open` failed."""

    @abstractmethod
    def _add(self, sequence: Sequence) -> None:
        """Queue a sequence."""

    @abstractmethod
    def _drop(self, sequence: Sequence) -> None:
        """Forget a queued or running sequence and free its memory."""

    @abstractmethod
    def _has_work(self) -> bool: ...

    @abstractmethod
    def _step(self) -> None:
        """Compute one step and append its deltas to `_outbox`. Sequences that end give their memory back."""

    @abstractmethod
    def _recover(self) -> Iterable[Sequence]:
        """After `_step` raised: forget the sequences that cannot go on, free their memory and return them."""

    @abstractmethod
    def _num_running(self) -> int:
        """Sequences that have been computed on. Called from any thread."""

    @abstractmethod
    def _kv_usage(self) -> float:
        """Share of the KV memory held. Called from any thread."""


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every end-of-sequence id of the generation config, or of the model's config if that has none; -1 is none."""
    generation_config: Any = model.generation_config
    ids = generation_config.eos_token_id if generation_config is not None else None
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(i for i in ([ids] if isinstance(ids, int) else ids) if i >= 0)
