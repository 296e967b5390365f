"""Chooses the engine for a model, by computing a few tokens both ways."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, PreTrainedModel

from moeless.core.errors import ConfigError
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams, TokenLogprob
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine, OnStep
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.experts import without_experts
from moeless.engine.transformers.hooks import NO_MEMORY_CHECK, PagedBatcher
from moeless.engine.transformers.rotary import SequenceRotary, changing_at, reset_factors
from moeless.engine.transformers.sequence import Sequence
from moeless.engine.transformers.static_batch import StaticBatchEngine

logger = logging.getLogger(__name__)

_PROBE_LENGTHS = (3, 12)
_PROBE_CHANGE = 8
"""Length at which the rotary factors change in the check of a model whose factors depend on length."""
_PROBE_CROSSING = 7
"""Length of a prompt that grows beyond `_PROBE_CHANGE` within `_PROBE_TOKENS`."""
_PROBE_TOKENS = 3
_PROBE_TOP = 20

_Generated = list[tuple[list[int], list[TokenLogprob]]]
"""For each prompt, its tokens and the tokens generated after it."""


def build_engine(model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None) -> Engine:
    """The continuous engine if the paged cache gives this model's own logits, the static one otherwise.

    Found out by computing a few tokens both ways, with the experts left out: no dispatcher need be attached yet.

    Args:
        tokenizer: a transformers tokenizer or a `tokenizers.Tokenizer`; used for token → text only.
        on_step: may be given later, by `set_on_step`.

    Raises: ConfigError if neither engine gives the model's own logits, whose rotary factors depend on length.
    """
    # A thread of its own, so that the caller's does no torch work.
    with ThreadPoolExecutor(1) as pool:
        kind = pool.submit(_choose, model, tokenizer).result()
    return kind(model, tokenizer, config, on_step)


def _choose(model: PreTrainedModel, tokenizer: Any) -> type[ContinuousEngine] | type[StaticBatchEngine]:
    rotary = SequenceRotary(model)
    if rotary.depends_on_length:
        logger.info(
            "rotary factors depend on length rope_type=%s base_length=%s changes_with_every_token=%s",
            rotary.kinds,
            rotary.base_length,
            rotary.changes_with_every_token,
        )
    obstacle = paging_obstacle(model, tokenizer)
    if obstacle is None:
        logger.info("engine chosen kind=continuous model_type=%s", model.config.model_type)
        return ContinuousEngine
    if rotary.depends_on_length:
        static_obstacle = _obstacle(model, tokenizer, _generate_statically)
        if static_obstacle is not None:
            raise ConfigError(
                f"model_type {model.config.model_type!r} with rope_type {rotary.kinds!r} cannot be served: its rotary "
                "factors depend on the length of a sequence, and no engine gives each sequence its own "
                f"(paged: {obstacle}; static: {static_obstacle})"
            )
    logger.info("engine chosen kind=static model_type=%s reason=%s", model.config.model_type, obstacle)
    return StaticBatchEngine


def paging_obstacle(model: PreTrainedModel, tokenizer: Any) -> str | None:
    """Why the paged cache cannot serve `model`, or None if it can."""
    return _obstacle(model, tokenizer, _generate_paged)


@torch.inference_mode()
def _obstacle(
    model: PreTrainedModel, tokenizer: Any, generate: Callable[[PreTrainedModel, Any, list[list[int]]], _Generated]
) -> str | None:
    """Why `generate` does not give the model's own log-probabilities, or None if it does.

    Where rotary factors depend on length, they are made to change between the probe lengths.
    """
    try:
        with without_experts(model), ExitStack() as stack:
            lengths: tuple[int, ...] = _PROBE_LENGTHS
            by_length = SequenceRotary(model).depends_on_length
            if by_length:
                lengths = (*lengths, _PROBE_CROSSING)
                stack.enter_context(changing_at(model, _PROBE_CHANGE))
                if SequenceRotary(model).base_length != _PROBE_CHANGE:
                    return f"rotary factors of rope_type {SequenceRotary(model).kinds!r} change at unknown lengths"
            vocab_size: int = model.config.get_text_config().vocab_size
            prompts = [[(7 * i + length) % vocab_size for i in range(length)] for length in lengths]
            for prompt, logprobs in generate(model, tokenizer, prompts):
                if len(logprobs) != _PROBE_TOKENS:  # logits that are not finite end a sequence
                    return f"a sequence ended after {len(logprobs)} of {_PROBE_TOKENS} tokens"
                difference = _largest_difference(model, prompt, logprobs, stepwise=by_length)
                allowed = 1e-3 if model.dtype == torch.float32 else 0.25
                if not difference <= allowed:
                    return f"log-probabilities differ from the model's own by {difference:.1e}"
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())  # in one line, as it is part of a message
    return None


def _probe_sequences(tokenizer: Any, prompts: list[list[int]]) -> list[Sequence]:
    sampling = SamplingParams(max_tokens=_PROBE_TOKENS, temperature=0.0, logprobs=_PROBE_TOP, ignore_eos=True)
    texts = TokenTexts(tokenizer)
    return [
        Sequence(
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling),
            eos_ids=frozenset(),
            texts=texts,
        )
        for i, prompt in enumerate(prompts)
    ]


def _generate_paged(model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]]) -> _Generated:
    """Prefill and decode the prompts in a small paged cache, those longer than 8 tokens in chunks."""
    batching = ContinuousBatchingConfig(
        page_size=4,
        num_blocks=16,
        max_batch_tokens=8,
        max_requests_per_batch=len(prompts),
        max_memory_percent=NO_MEMORY_CHECK,
        max_blocks_per_request=0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    generated: list[list[TokenLogprob]] = [[] for _ in prompts]
    batcher = PagedBatcher(model, batching)
    try:
        for sequence in _probe_sequences(tokenizer, prompts):
            batcher.add(sequence)
        while batcher.has_work():
            for delta in batcher.step():
                generated[int(delta.request_id)] += delta.logprobs
    finally:
        batcher.close()
    return list(zip(prompts, generated, strict=True))


def _generate_statically(model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]]) -> _Generated:
    """Prefill and decode the prompts in one static batch."""
    generated: list[list[TokenLogprob]] = [[] for _ in prompts]

    def on_step(deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            generated[int(delta.request_id)] += delta.logprobs

    engine = StaticBatchEngine(model, tokenizer, EngineConfig(max_running=len(prompts)), on_step)
    engine.run_to_end(_probe_sequences(tokenizer, prompts))
    return list(zip(prompts, generated, strict=True))


def _largest_difference(
    model: PreTrainedModel, prompt: list[int], generated: list[TokenLogprob], *, stepwise: bool
) -> float:
    """Between the generated tokens' log-probabilities and those of forward passes without a cache.

    Args:
        stepwise: whether each token needs a pass of its own, over exactly the tokens before it.
    """
    token_ids = [*prompt, *(token.token_id for token in generated[:-1])]
    if stepwise:
        logits = torch.stack(
            [_logits(model, token_ids[:length])[-1] for length in range(len(prompt), len(token_ids) + 1)]
        )
    else:
        logits = _logits(model, token_ids)[len(prompt) - 1 :]
    expected = logits.float().log_softmax(dim=-1)
    return max(
        abs(float(expected[step, token_id]) - logprob)
        for step, token in enumerate(generated)
        for token_id, _, _, logprob in token.top
    )


def _logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Logits of a model that has computed nothing before, (T, V)."""
    reset_factors(model)
    logits: Tensor = model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    return logits
