"""Both engines on a GPU, against the same model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeless.core.generation import SamplingParams
from moeless.engine.transformers.row_sampler import RowSampler
from moeless.engine.transformers.sampling import sample
from tests.unit.engine.support import Recorder, assert_equal_tokens, eager_model, prompt_of, request, running

pytestmark = pytest.mark.gpu

LENGTHS = (1, 7, 64, 150)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_greedy_tokens_are_the_models_own(family: str) -> None:
    recorder = Recorder()
    with running(eager_model(family).to("cuda"), recorder) as engine:
        for length in LENGTHS:
            engine.submit(request(str(length), prompt_of(length), max_tokens=30))
        answers = recorder.wait_for(*map(str, LENGTHS))
        assert engine.counters().kv_cache_usage == 0
    model = eager_model(family)
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 3, "top_p": 0.8},
        {"seed": 3, "top_k": 9},
        {"seed": 3, "min_p": 0.05, "repetition_penalty": 1.3},
        {"seed": 3, "logit_bias": {5: 2.0}, "presence_penalty": 1.0, "logprobs": 4},
    ],
)
def test_a_token_is_the_same_on_either_device(params: dict[str, Any]) -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) * 3
    chosen = []
    for device in ("cpu", "cuda"):
        rows = [RowSampler(SamplingParams(max_tokens=9, **params)) for _ in range(6)]
        for row in rows:
            row.commit(11)
        chosen.append(sample(logits.to(device), rows).token_ids)
    assert chosen[0] == chosen[1]
