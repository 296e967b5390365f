"""Engines over tiny random models, and what came out of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeless.core.generation import FinishReason, GenerationDelta, GenerationRequest, SamplingParams
from moeless.engine.config import EngineConfig
from moeless.engine.transformers.build import build_engine
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.engine.transformers.threaded_engine import ThreadedEngine
from tests.families import VOCAB_SIZE, make_model, make_tokenizer

DEADLINE_S = 30.0
NUM_SPECIAL = 6


@dataclass
class Answer:
    """All deltas of one request, put together."""

    deltas: list[GenerationDelta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def num_tokens(self) -> int:
        return sum(delta.num_tokens for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        """Known for requests with logprobs only."""
        return [token.token_id for delta in self.deltas for token in delta.logprobs]

    @property
    def last(self) -> GenerationDelta:
        return self.deltas[-1]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason


class Recorder:
    """An `on_step` that keeps every delta; `hold` lets a test stop the generation thread inside it."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.steps: list[list[str]] = []
        self.usage_at_end: dict[str, float] = {}
        self.engine: ThreadedEngine | None = None
        self._changed = threading.Condition()
        self._go = threading.Event()
        self._go.set()

    def __call__(self, deltas: list[GenerationDelta]) -> None:
        with self._changed:
            self.steps.append([delta.request_id for delta in deltas])
            for delta in deltas:
                self.answers.setdefault(delta.request_id, Answer()).deltas.append(delta)
                if delta.finish_reason is not None and self.engine is not None:
                    self.usage_at_end[delta.request_id] = self.engine.counters().kv_cache_usage
            self._changed.notify_all()
        assert self._go.wait(DEADLINE_S)

    def hold(self) -> None:
        """Stop the generation thread after its next step, until `release`."""
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def wait_for(self, *request_ids: str) -> list[Answer]:
        """The answers, once all of them have ended."""
        self._wait(lambda: all(self._ended(request_id) for request_id in request_ids))
        return [self.answers[request_id] for request_id in request_ids]

    def wait_for_tokens(self, request_id: str, count: int = 1) -> None:
        self._wait(lambda: request_id in self.answers and self.answers[request_id].num_tokens >= count)

    def wait_for_step(self, number: int) -> None:
        """Wait until a number of steps have been computed."""
        self._wait(lambda: len(self.steps) >= number)

    def _ended(self, request_id: str) -> bool:
        return request_id in self.answers and self.answers[request_id].finish_reason is not None

    def _wait(self, condition: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), f"nothing came in {DEADLINE_S} s: {self.answers}"


@contextmanager
def running(
    model: PreTrainedModel, recorder: Recorder, tokenizer: Any = None, **settings: Any
) -> Iterator[ThreadedEngine]:
    """A started engine with a small KV memory."""
    config = EngineConfig(**({"kv_cache_bytes": 1 << 22, "max_running": 8, "max_batch_tokens": 64} | settings))
    engine = build_engine(model, tokenizer or make_tokenizer(), config, recorder)
    assert isinstance(engine, ThreadedEngine)
    recorder.engine = engine
    engine.start()
    try:
        yield engine
    finally:
        recorder.release()
        engine.stop()


def request(request_id: str, prompt: list[int], **sampling: Any) -> GenerationRequest:
    """Greedy, with the sampled tokens' ids in the answer, unless told otherwise."""
    params: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**(params | sampling))
    )


def prompt_of(length: int, *, seed: int = 0) -> list[int]:
    """Random tokens, none special."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def eager_model(family: str = "mixtral") -> PreTrainedModel:
    """A model with its own experts, computed by transformers."""
    model = make_model(family)
    model.set_experts_implementation("eager")
    return model


class LocalExperts:
    """A dispatcher that lets transformers compute every layer, and fails when told to."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = [module for module in model.modules() if hasattr(module, "_apply_gate")]
        for layer, module in enumerate(self._modules):
            module.moeless_layer = layer  # type: ignore[assignment]
        self.fail_next: Exception | None = None
        self.num_calls = 0

    def forward(self, layer: int, hidden_TH: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        self.num_calls += 1
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        module = self._modules[layer]
        eager: Any = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        output: Tensor = eager(module, hidden_TH, top_k_index_Tk, top_k_weights_Tk)
        return output


def dispatched_model(family: str = "mixtral") -> tuple[PreTrainedModel, LocalExperts]:
    """A model whose experts implementation is `moeless`."""
    model = make_model(family)
    register_experts()
    experts = LocalExperts(model)
    attach_dispatcher(model, experts)
    model.set_experts_implementation("moeless")
    return model, experts


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompt: list[int], generated: list[int]) -> Tensor:
    """Logits that give each generated token, from one forward pass without a cache, (N, V)."""
    logits: Tensor = model(torch.tensor([prompt + generated]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits


def assert_equal_tokens(model: PreTrainedModel, prompt: list[int], generated: list[int]) -> None:
    """design.md's "Equal tokens": each is the argmax on its very prefix, or within 1e-3 of it."""
    logits = reference_logits(model, prompt, generated)
    gap = logits.max(dim=-1).values - logits.gather(1, torch.tensor(generated).unsqueeze(1)).squeeze(1)
    assert gap.max() <= 1e-3, f"token {int(gap.argmax())} is {gap.max():.2e} below the best"
