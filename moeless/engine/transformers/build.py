"""Choosing the engine for a model."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from moeless.core.generation import GenerationRequest, SamplingParams, TokenLogprob
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine, OnStep
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.experts import without_experts
from moeless.engine.transformers.hooks import NO_MEMORY_CHECK, PagedBatcher
from moeless.engine.transformers.sequence import Sequence
from moeless.engine.transformers.static_batch import StaticBatchEngine

logger = logging.getLogger(__name__)

_PROBE_LENGTHS = (3, 12)
_PROBE_TOKENS = 3
_PROBE_TOP = 20


def build_engine(model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None) -> Engine:
    """The continuous engine if the paged cache gives this model's own logits, the static one otherwise.

    Found out by computing a few tokens both ways, with the experts left out: no dispatcher need be attached yet.

    Args:
        tokenizer: a transformers tokenizer or a `tokenizers.Tokenizer`; used for token → text only.
        on_step: may be given later, by `set_on_step`.
    """
    # A thread of its own, so that the caller's does no torch work.
    with ThreadPoolExecutor(1) as pool:
        obstacle = pool.submit(paging_obstacle, model, tokenizer).result()
    if obstacle is None:
        logger.info("engine chosen kind=continuous model_type=%s", model.config.model_type)
        return ContinuousEngine(model, tokenizer, config, on_step)
    logger.info("engine chosen kind=static model_type=%s reason=%s", model.config.model_type, obstacle)
    return StaticBatchEngine(model, tokenizer, config, on_step)


@torch.inference_mode()
def paging_obstacle(model: PreTrainedModel, tokenizer: Any) -> str | None:
    """Why the paged cache cannot serve `model`, or None if it can."""
    try:
        with without_experts(model):
            generated = _generate_paged(model, tokenizer)
            for prompt, logprobs in generated:
                difference = _largest_difference(model, prompt, logprobs)
                allowed = 1e-3 if model.dtype == torch.float32 else 0.25
                if not difference <= allowed:
                    return f"paged log-probabilities differ from the model's own by {difference:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _generate_paged(model: PreTrainedModel, tokenizer: Any) -> list[tuple[list[int], list[TokenLogprob]]]:
    """Prefill and decode the probe prompts in a small paged cache, the longer prompt in chunks.

    Returns: for each prompt, its tokens and the tokens generated after it.
    """
    batching = ContinuousBatchingConfig(
        page_size=4,
        num_blocks=16,
        max_batch_tokens=8,
        max_requests_per_batch=len(_PROBE_LENGTHS),
        max_memory_percent=NO_MEMORY_CHECK,
        max_blocks_per_request=0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    texts = TokenTexts(tokenizer)
    vocab_size: int = model.config.get_text_config().vocab_size
    prompts = [[(7 * i + length) % vocab_size for i in range(length)] for length in _PROBE_LENGTHS]
    sampling = SamplingParams(max_tokens=_PROBE_TOKENS, temperature=0.0, logprobs=_PROBE_TOP, ignore_eos=True)
    generated: list[list[TokenLogprob]] = [[] for _ in prompts]
    batcher = PagedBatcher(model, batching)
    try:
        for i, prompt in enumerate(prompts):
            request = GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling)
            batcher.add(Sequence(request, eos_ids=frozenset(), texts=texts))
        while batcher.has_work():
            for delta in batcher.step():
                generated[int(delta.request_id)] += delta.logprobs
    finally:
        batcher.close()
    return list(zip(prompts, generated, strict=True))


def _largest_difference(model: PreTrainedModel, prompt: list[int], generated: list[TokenLogprob]) -> float:
    """Between the generated tokens' log-probabilities and those of one forward pass without a cache."""
    token_ids = [*prompt, *(token.token_id for token in generated[:-1])]
    logits = model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0, len(prompt) - 1 :]
    expected = logits.float().log_softmax(dim=-1)
    return max(
        abs(float(expected[step, token_id]) - logprob)
        for step, token in enumerate(generated)
        for token_id, _, _, logprob in token.top
    )
