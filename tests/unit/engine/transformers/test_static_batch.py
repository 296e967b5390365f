"""The engine for what cannot be paged, against transformers' own forward pass on the same model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from moeless.core.errors import ConfigError, ContextLengthError, FunctionUnavailableError
from moeless.engine.config import EngineConfig
from moeless.engine.transformers import static_batch
from moeless.engine.transformers.static_batch import StaticBatchEngine
from tests.families import make_tokenizer
from tests.unit.engine.support import (
    Recorder,
    assert_equal_tokens,
    dispatched_model,
    eager_model,
    prompt_of,
    request,
    running,
)

MODEL = eager_model("deepseek_v3")
LENGTHS = (1, 2, 7, 30, 63, 64, 65, 150)
# The latent (16) and the rotary keys (8) in float32, 3 layers.
TOKEN_BYTES = 3 * (16 + 8) * 4


def generated_by_transformers(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        # An end token that cannot come: transformers then goes on to the last token.
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "mimo_v2_flash", "inkling_text"])
def test_greedy_tokens_of_a_mixed_batch_are_the_models_own(family: str) -> None:
    model = eager_model(family)
    recorder = Recorder()
    with running(model, recorder) as engine:
        assert isinstance(engine, StaticBatchEngine)
        for length in LENGTHS:
            engine.submit(request(str(length), prompt_of(length), max_tokens=5 + length % 20))
        answers = recorder.wait_for(*map(str, LENGTHS))
        assert engine.counters().kv_cache_usage == 0
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert len(answer.token_ids) == 5 + length % 20
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


def test_tokens_equal_those_of_generate() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        for length in (5, 40):
            engine.submit(request(str(length), prompt_of(length), max_tokens=20))
        for length, answer in zip((5, 40), recorder.wait_for("5", "40"), strict=True):
            assert answer.token_ids == generated_by_transformers(MODEL, prompt_of(length), 20)


@pytest.mark.parametrize("family", ["deepseek_v3", "mimo_v2_flash"])
def test_requests_join_and_leave_at_any_step(family: str) -> None:
    model = eager_model(family)
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("long", prompt_of(10), max_tokens=60))
        recorder.wait_for_tokens("long", 3)
        engine.submit(request("wide", prompt_of(100), max_tokens=4))
        engine.submit(request("short", prompt_of(3), max_tokens=30))
        answers = recorder.wait_for("long", "wide", "short")
    assert any(set(step) == {"long", "wide", "short"} for step in recorder.steps)
    for length, answer in zip((10, 100, 3), answers, strict=True):
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "deepseek_v32"])
def test_a_cache_that_cannot_be_padded_takes_new_requests_when_it_is_empty(family: str) -> None:
    model = eager_model(family)
    recorder = Recorder()
    with running(model, recorder) as engine:
        recorder.hold()
        engine.submit(request("first", prompt_of(10), max_tokens=6))
        recorder.wait_for_tokens("first")
        # Two that begin together and end apart.
        engine.submit(request("second", prompt_of(4), max_tokens=3))
        engine.submit(request("third", prompt_of(25), max_tokens=9))
        recorder.release()
        answers = recorder.wait_for("first", "second", "third")
    assert not any("first" in step and len(step) > 1 for step in recorder.steps)
    assert ["second", "third"] in recorder.steps
    for length, answer in zip((10, 4, 25), answers, strict=True):
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


def test_positions_that_a_model_keeps_in_its_cache_leave_with_their_sequence() -> None:
    model = eager_model("qwen4_exp_text")
    recorder = Recorder()
    with running(model, recorder) as engine:
        recorder.hold()
        engine.submit(request("first", prompt_of(2), max_tokens=1))
        recorder.wait_for_tokens("first")
        for length in (3, 12):
            engine.submit(request(str(length), prompt_of(length), max_tokens=length))
        recorder.release()
        answers = recorder.wait_for("3", "12")
    assert ["3", "12"] in recorder.steps
    for length, answer in zip((3, 12), answers, strict=True):
        assert answer.last.error is None
        assert_equal_tokens(model, prompt_of(length), answer.token_ids)


def test_a_cache_class_of_the_models_own_gets_no_padding() -> None:
    model = eager_model("minimax")
    recorder = Recorder()
    lengths = {"a": 4, "b": 4, "c": 25}
    with running(model, recorder) as engine:
        recorder.hold()
        engine.submit(request("first", prompt_of(9)))
        recorder.wait_for_tokens("first")
        for seed, (request_id, length) in enumerate(lengths.items()):
            engine.submit(request(request_id, prompt_of(length, seed=seed), max_tokens=6))
        recorder.release()
        answers = recorder.wait_for(*lengths)
    assert ["a", "b"] in recorder.steps
    assert not any("c" in step and len(step) > 1 for step in recorder.steps)
    for seed, (length, answer) in enumerate(zip(lengths.values(), answers, strict=True)):
        # Its forward pass without a cache is another computation: generate is the reference here.
        assert answer.token_ids == generated_by_transformers(model, prompt_of(length, seed=seed), 6)


def test_a_seed_gives_the_same_tokens_alone_and_in_company() -> None:
    alone, company = Recorder(), Recorder()
    seeded = request("seeded", prompt_of(12), temperature=1.0, seed=11, max_tokens=30)
    with running(MODEL, alone) as engine:
        engine.submit(seeded)
        alone.wait_for("seeded")
    with running(MODEL, company) as engine:
        for n in range(4):
            engine.submit(request(f"other {n}", prompt_of(5 + 9 * n), temperature=0.5 * n, max_tokens=25))
        engine.submit(seeded)
        company.wait_for("seeded")
    assert alone.answers["seeded"].token_ids == company.answers["seeded"].token_ids


def test_a_stop_string_ends_the_sequence_at_once_and_frees_its_memory() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("free", prompt_of(6), max_tokens=40))
        (free,) = recorder.wait_for("free")
        stop = free.text[9:13]
        engine.submit(request("stopped", prompt_of(6), max_tokens=400, stop=(stop,)))
        (stopped,) = recorder.wait_for("stopped")
    assert stopped.text == free.text[: free.text.find(stop)]
    assert recorder.usage_at_end["stopped"] == 0


def test_cancelling_frees_one_row_and_lets_the_others_go_on() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("stays", prompt_of(10), max_tokens=60))
        engine.submit(request("goes", prompt_of(100), max_tokens=400))
        recorder.wait_for_tokens("goes", 2)
        recorder.hold()
        engine.cancel("goes")
        before = engine.counters()
        assert before.requests_running == 2
        recorder.release()
        goes, stays = recorder.wait_for("goes", "stays")
    assert goes.finish_reason == "cancelled"
    # The padding that the long prompt made necessary went with it.
    assert recorder.usage_at_end["goes"] < before.kv_cache_usage / 4
    assert_equal_tokens(MODEL, prompt_of(10), stays.token_ids)


def test_cancelling_takes_a_waiting_request_off_the_queue() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, max_running=1) as engine:
        engine.submit(request("running", prompt_of(5), max_tokens=300))
        recorder.wait_for_tokens("running")
        engine.submit(request("waiting", prompt_of(5)))
        assert engine.counters().requests_waiting == 1
        engine.cancel("waiting")
        (waiting,) = recorder.wait_for("waiting")
        assert (waiting.finish_reason, waiting.num_tokens) == ("cancelled", 0)


def test_sequences_wait_for_memory() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, kv_cache_bytes=TOKEN_BYTES * 100) as engine:
        assert engine.max_context_tokens == 100
        with pytest.raises(ContextLengthError, match="context of 100"):
            engine.submit(request("r", prompt_of(60), max_tokens=41))
        for n in range(4):
            engine.submit(request(str(n), prompt_of(20, seed=n), max_tokens=20))
        answers = recorder.wait_for("0", "1", "2", "3")
    assert max(len(step) for step in recorder.steps) == 2
    for n, answer in enumerate(answers):
        assert_equal_tokens(MODEL, prompt_of(20, seed=n), answer.token_ids)


def test_a_pool_too_small_for_anything_is_refused() -> None:
    engine = StaticBatchEngine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=1), lambda deltas: None)
    with pytest.raises(ConfigError, match=f"at least two tokens of {TOKEN_BYTES} bytes, got 1"):
        engine.start()


def test_an_error_while_decoding_fails_the_batch_and_no_other() -> None:
    model, experts = dispatched_model("deepseek_v3")
    recorder = Recorder()
    with running(model, recorder, max_running=2) as engine:
        for n in range(2):
            engine.submit(request(str(n), prompt_of(20 + n), max_tokens=300))
        recorder.wait_for_tokens("0")
        recorder.wait_for_tokens("1")
        engine.submit(request("waiting", prompt_of(9)))
        experts.fail_next = FunctionUnavailableError("L01.E003 could not be computed anywhere")
        first, second, waiting = recorder.wait_for("0", "1", "waiting")
    for answer in (first, second):
        assert (answer.finish_reason, answer.last.error) == ("error", "L01.E003 could not be computed anywhere")
    assert_equal_tokens(model, prompt_of(9), waiting.token_ids)


def test_an_error_while_joining_fails_those_that_join() -> None:
    model, experts = dispatched_model("deepseek_v3")
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("running", prompt_of(20), max_tokens=30))
        recorder.wait_for_tokens("running")
        recorder.hold()
        seen = recorder.answers["running"].num_tokens
        recorder.wait_for_tokens("running", seen + 1)
        engine.submit(request("joining", prompt_of(9)))
        experts.fail_next = RuntimeError("boom")
        recorder.release()
        joining, going_on = recorder.wait_for("joining", "running")
    assert joining.last.error == "RuntimeError: boom"
    assert going_on.finish_reason == "length"
    assert_equal_tokens(model, prompt_of(20), going_on.token_ids)


def test_an_error_while_merging_fails_both_batches_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = dispatched_model("deepseek_v3")
    merge = static_batch._merge

    def merge_fails_once(*_: object) -> object:
        monkeypatch.setattr(static_batch, "_merge", merge)
        raise RuntimeError("out of memory")

    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("running", prompt_of(20), max_tokens=300))
        recorder.wait_for_tokens("running")
        monkeypatch.setattr(static_batch, "_merge", merge_fails_once)
        engine.submit(request("joining", prompt_of(9), max_tokens=300))
        for answer in recorder.wait_for("running", "joining"):
            assert answer.last.error == "RuntimeError: out of memory"
        engine.submit(request("later", prompt_of(9)))
        (later,) = recorder.wait_for("later")
    assert_equal_tokens(model, prompt_of(9), later.token_ids)
