from __future__ import annotations

import logging
import threading

import pytest
import torch

from moeless.engine.config import EngineConfig
from moeless.engine.transformers import paged_attention
from moeless.engine.transformers.build import build_engine, paging_obstacle
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.static_batch import StaticBatchEngine
from tests.families import PARITY_FAMILIES, make_model, make_tokenizer
from tests.unit.engine.support import Recorder, assert_equal_tokens, dispatched_model, prompt_of, request, running

STATIC = {"deepseek_v2", "deepseek_v3"}


@pytest.mark.parametrize("family", sorted(PARITY_FAMILIES))
def test_every_family_answers_with_its_own_tokens_on_the_engine_that_suits_it(family: str) -> None:
    model, _ = dispatched_model(family)
    recorder = Recorder()
    with running(model, recorder) as engine:
        assert isinstance(engine, StaticBatchEngine if family in STATIC else ContinuousEngine)
        for length in (3, 17, 70):
            engine.submit(request(str(length), prompt_of(length), max_tokens=10))
        answers = recorder.wait_for("3", "17", "70")
    for length, answer in zip((3, 17, 70), answers, strict=True):
        assert len(answer.token_ids) == 10
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


def test_half_precision_is_paged_too() -> None:
    model = make_model("mixtral").to(torch.bfloat16)
    model.set_experts_implementation("eager")
    assert paging_obstacle(model, make_tokenizer()) is None


def test_choosing_asks_no_expert_and_leaves_the_model_as_it_was() -> None:
    for family in ("mixtral", "deepseek_v3"):
        model, experts = dispatched_model(family)
        attention, threads = model.config._attn_implementation, threading.active_count()
        build_engine(model, make_tokenizer(), EngineConfig())
        assert experts.num_calls == 0
        assert model.config._experts_implementation == "moeless"
        assert model.config._attn_implementation == attention
        assert threading.active_count() == threads


def test_attention_that_pages_get_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    right = paged_attention._decode

    def wrong(query: torch.Tensor, *rest: object) -> torch.Tensor:
        return right(query.flip(1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(paged_attention, "_decode", wrong)
    obstacle = paging_obstacle(model, make_tokenizer())
    assert obstacle is not None
    assert obstacle.startswith("log-probabilities differ from the model's own by")


def test_attention_whose_pages_give_no_finite_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a sequence ends early with an error of its own; the tokens before it were right."""
    decode = paged_attention._decode

    def spoiled(query: torch.Tensor, *rest: object) -> torch.Tensor:
        return decode(query, *rest) * float("nan")  # type: ignore[arg-type]

    monkeypatch.setattr(paged_attention, "_decode", spoiled)
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    assert paging_obstacle(model, make_tokenizer()) == "a sequence ended after 1 of 3 tokens"


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moeless.engine.transformers.build"):
        build_engine(make_model("qwen3_next"), make_tokenizer(), EngineConfig())
        build_engine(make_model("mixtral"), make_tokenizer(), EngineConfig())
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "engine chosen kind=static model_type=qwen3_next reason=ValueError: Invalid layer type: linear_attention"
    )
    assert second == "engine chosen kind=continuous model_type=mixtral"
