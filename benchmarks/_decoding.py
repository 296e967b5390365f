"""Ways to decode a batch of prompts, timed, and the table that compares them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from benchmarks._models import word_tokenizer
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.engine.config import EngineConfig
from moeless.engine.transformers.continuous import ContinuousEngine

Prompts = list[list[int]]
Way = Callable[[Prompts, int], float]
"""Generates that many tokens after each prompt; returns tokens per second."""


class Batched:
    """moeless's ContinuousEngine around any model."""

    def __init__(self, model: PreTrainedModel, *, threads: int, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self._left = 0
        self._done = threading.Event()
        self._error: str | None = None
        config = EngineConfig(num_threads=threads, prefix_sharing=False, max_batch_tokens=1024, kv_cache_bytes=64 << 20)
        tokenizer = word_tokenizer(model.config.get_text_config().vocab_size)
        self._engine = ContinuousEngine(model, tokenizer, config, self._on_step)
        self._engine.start()

    def __call__(self, prompts: Prompts, num_tokens: int) -> float:
        """Prefill included, as a client sees it."""
        self._before()
        self._done.clear()
        self._left = len(prompts)
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._engine.submit(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        self._done.wait()
        if self._error is not None:
            raise RuntimeError(self._error)
        return len(prompts) * num_tokens / (time.perf_counter() - started_s)

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            self._error = self._error or delta.error
            self._left -= delta.finish_reason is not None
        if self._left == 0:
            self._done.set()

    def close(self) -> None:
        """End the generation thread."""
        self._engine.stop()


@torch.inference_mode()
def decode_statically(model: PreTrainedModel, prompts: Prompts, num_tokens: int) -> float:
    """Tokens per second of a bare greedy loop over a static cache, without the prefill."""
    batch, length = len(prompts), len(prompts[0])
    cache = StaticCache(config=model.config, max_cache_len=length + num_tokens + 1)
    logits = model(torch.tensor(prompts), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    tokens = logits[:, -1:].argmax(dim=-1)
    started_s = time.perf_counter()
    for _ in range(num_tokens):
        logits = model(tokens, past_key_values=cache, use_cache=True).logits
        tokens = logits[:, -1:].argmax(dim=-1)
    return batch * num_tokens / (time.perf_counter() - started_s)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: Prompts, num_tokens: int) -> float:
    """Tokens per second of transformers' `generate`, prefill included."""
    generation = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = torch.tensor(prompts)
    started_s = time.perf_counter()
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=generation)
    seconds = time.perf_counter() - started_s
    assert output.shape[1] == len(prompts[0]) + num_tokens
    return len(prompts) * num_tokens / seconds


def in_turns(ways: Mapping[str, Way], prompts: Prompts, num_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way, repeat by repeat in turns, after one round of a few tokens to warm up."""
    for way in ways.values():
        way(prompts, 2)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(way(prompts, num_tokens))
    return rates


def compare(title: str, by_batch: Mapping[int, dict[str, list[float]]], *, ours: str = "moeless") -> None:
    """Print medians, spreads, and the ratio to the best of the others: the median of the repeats' own ratios."""
    table = Table("batch", "way", "tok/s (median)", "spread", "ratio", title=f"{title}; ratio to the best other")
    for batch, rates in by_batch.items():
        others = [name for name in rates if name != ours]
        best = max(others, key=lambda name: statistics.median(rates[name]))
        for name, values in rates.items():
            ratio = statistics.median(mine / other for mine, other in zip(values, rates[best], strict=True))
            table.add_row(
                str(batch),
                name,
                f"{statistics.median(values):.0f}",
                f"{min(values):.0f}-{max(values):.0f}",
                f"{ratio:.2f}",
            )
    Console().print(table)
