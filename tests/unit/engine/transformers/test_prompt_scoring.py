from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeless.core.generation import GenerationDelta, TokenLogprob
from moeless.engine.observing import RowSpan
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.hooks import kv_bytes_per_token
from moeless.engine.transformers.prompt_scoring import PromptScorer
from moeless.engine.transformers.sequence import Sequence
from tests.families import FAMILIES, make_tokenizer
from tests.unit.engine.support import Answer, Recorder, eager_model, prompt_of, request, running

ENGINE_FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")
TEXTS = TokenTexts(make_tokenizer())
NUM_TOP = 3


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """Each position's log-probabilities of the token after it, (N, V)."""
    logits: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


def assert_scores(found: list[TokenLogprob], model: PreTrainedModel, prompt: list[int], *, num_top: int) -> None:
    expected = reference(model, prompt)
    assert [token.token_id for token in found] == prompt[1:]
    for position, token in enumerate(found):
        row = expected[position]
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=2e-4)
        likelier = [int((row > row[token.token_id] + shift).sum()) + 1 for shift in (1e-3, -1e-3)]
        assert likelier[0] <= token.rank <= likelier[1]
        assert [entry[3] for entry in token.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=2e-4)
        assert [float(row[entry[0]]) for entry in token.top] == pytest.approx(
            row.topk(num_top).values.tolist(), abs=1e-3
        )
        assert token.token_bytes == TEXTS.bytes_of(token.token_id)


def prompt_tokens(answer: Answer) -> list[TokenLogprob]:
    return [token for delta in answer.deltas for token in delta.prompt_logprobs]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_familys_output_layer_is_applied_as_its_forward_does(family: str) -> None:
    model = eager_model(family)
    scorer = PromptScorer(model)
    assert scorer.obstacle is None
    prompt = prompt_of(70)
    sequence = Sequence(request("r", prompt, prompt_logprobs=NUM_TOP), eos_ids=frozenset(), texts=TEXTS)
    deltas: list[GenerationDelta] = []
    with torch.inference_mode(), scorer.watch([RowSpan(sequence, 0, len(prompt), 0)], deltas.append):
        model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    assert sequence.take_delta().error is None
    found = [token for delta in deltas for token in delta.prompt_logprobs]
    assert_scores(found, model, prompt, num_top=NUM_TOP)


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_prompts_are_scored_beside_others_and_in_chunks(family: str) -> None:
    model = eager_model(family)
    lengths = {1: 0, 2: 3, 9: 0, 150: NUM_TOP}
    recorder = Recorder()
    with running(model, recorder, max_batch_tokens=32) as engine:
        engine.submit(request("beside", prompt_of(5, seed=1), max_tokens=40))
        recorder.wait_for_tokens("beside")
        for length, num_top in lengths.items():
            engine.submit(request(str(length), prompt_of(length), max_tokens=4, prompt_logprobs=num_top))
        answers = recorder.wait_for(*map(str, lengths), "beside")
    assert not prompt_tokens(answers.pop())
    for (length, num_top), answer in zip(lengths.items(), answers, strict=True):
        assert (answer.finish_reason, answer.num_tokens) == ("length", 4)
        is_prompt = [bool(delta.prompt_logprobs) for delta in answer.deltas]
        assert is_prompt == sorted(is_prompt, reverse=True), "the prompt's must come first"
        assert_scores(prompt_tokens(answer), eager_model(family), prompt_of(length), num_top=num_top)


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_max_tokens_0_computes_the_prompt_and_generates_nothing(family: str) -> None:
    model = eager_model(family)
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("scored", prompt_of(30), max_tokens=0, prompt_logprobs=0))
        engine.submit(request("plain", prompt_of(30), max_tokens=0))
        scored, plain = recorder.wait_for("scored", "plain")
        assert engine.counters().kv_cache_usage == 0
    for answer in (scored, plain):
        assert (answer.finish_reason, answer.num_tokens, answer.text) == ("length", 0, "")
        assert not answer.token_ids
    assert not prompt_tokens(plain)
    assert_scores(prompt_tokens(scored), eager_model(family), prompt_of(30), num_top=0)


def test_a_prompt_that_fills_the_context_is_scored() -> None:
    recorder = Recorder()
    with running(eager_model(), recorder) as engine:
        length = engine.max_context_tokens
        engine.submit(request("full", prompt_of(length), max_tokens=0, prompt_logprobs=0))
        (answer,) = recorder.wait_for("full")
    assert len(prompt_tokens(answer)) == length - 1


def test_pages_of_an_equal_prompt_are_not_taken_over_by_a_prompt_that_is_scored() -> None:
    model, prompt = eager_model(), prompt_of(60)
    recorder = Recorder()
    with running(model, recorder, page_size=4) as engine:
        for name, params in (("first", {}), ("shares", {}), ("scored", {"prompt_logprobs": 0})):
            engine.submit(request(name, prompt, **params))
            recorder.wait_for(name)
    cached = {name: answer.last.num_cached_tokens for name, answer in recorder.answers.items()}
    assert cached["shares"] > 0
    assert cached["scored"] == 0
    assert_scores(prompt_tokens(recorder.answers["scored"]), eager_model(), prompt, num_top=0)
    assert recorder.answers["scored"].token_ids == recorder.answers["first"].token_ids


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_logits_of_a_few_rows_exist_at_a_time(family: str) -> None:
    model = eager_model(family)
    num_rows: list[int] = []

    def count(_module: Any, _args: Any, logits: Tensor) -> None:
        num_rows.append(logits.numel() // logits.shape[-1])

    recorder = Recorder()
    with running(model, recorder, max_batch_tokens=512) as engine:
        handle = model.get_output_embeddings().register_forward_hook(count)
        engine.submit(request("long", prompt_of(200), max_tokens=1, prompt_logprobs=1))
        (answer,) = recorder.wait_for("long")
        handle.remove()
    assert len(prompt_tokens(answer)) == 199
    assert max(num_rows) <= 64
    assert max(len(delta.prompt_logprobs) for delta in answer.deltas) <= 64


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_a_prompt_whose_scores_are_not_finite_fails_alone(family: str) -> None:
    model = eager_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan  # type: ignore[index]
    good = [token_id if token_id != 77 else 78 for token_id in prompt_of(20)]
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("bad", [*good, 77, *good], max_tokens=0, prompt_logprobs=1))
        engine.submit(request("good", good, max_tokens=0, prompt_logprobs=1))
        bad, fine = recorder.wait_for("bad", "good")
    assert bad.finish_reason == "error"
    assert "the log-probability of prompt token" in (bad.last.error or "")
    assert_scores(prompt_tokens(fine), model, good, num_top=1)


def test_sequences_that_give_their_pages_back_score_each_prompt_token_once() -> None:
    model = eager_model()
    recorder = Recorder()
    names = [str(n) for n in range(5)]
    # Each fits alone (100 of 128 tokens), all together do not.
    with running(
        model, recorder, kv_cache_bytes=128 * kv_bytes_per_token(model), page_size=4, max_batch_tokens=8
    ) as engine:
        for n, name in enumerate(names):
            engine.submit(request(name, prompt_of(40, seed=n), max_tokens=60, prompt_logprobs=1))
        answers = recorder.wait_for(*names)
    for n, answer in enumerate(answers):
        assert answer.num_tokens == 60
        assert_scores(prompt_tokens(answer), eager_model(), prompt_of(40, seed=n), num_top=1)
