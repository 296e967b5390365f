"""The engine with the paged cache, against transformers' own forward pass on the same model."""

from __future__ import annotations

import threading

import pytest

from moeless.core.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    FunctionUnavailableError,
    QueueFullError,
    RequestError,
)
from moeless.core.generation import GenerationDelta
from moeless.engine.config import EngineConfig
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.hooks import kv_bytes_per_token
from tests.families import EOS_ID, VOCAB_SIZE, make_tokenizer
from tests.unit.engine.support import (
    Recorder,
    assert_equal_tokens,
    dispatched_model,
    eager_model,
    prompt_of,
    reference_logits,
    request,
    running,
)

MODEL = eager_model()
LENGTHS = (1, 2, 7, 30, 63, 64, 65, 150)


def pool_of(num_tokens: int) -> int:
    """Bytes of a KV pool by its tokens."""
    return num_tokens * kv_bytes_per_token(MODEL)


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4, 32])
def test_greedy_tokens_of_a_mixed_batch_are_the_models_own(page_size: int) -> None:
    recorder = Recorder()
    with running(MODEL, recorder, page_size=page_size) as engine:
        for length in LENGTHS:
            engine.submit(request(str(length), prompt_of(length), max_tokens=20))
        answers = recorder.wait_for(*map(str, LENGTHS))
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert len(answer.token_ids) == 20
        assert answer.last.num_prompt_tokens == length
        assert_equal_tokens(MODEL, prompt_of(length), answer.token_ids)


def test_requests_join_while_others_decode() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("first", prompt_of(10), max_tokens=60))
        recorder.wait_for_tokens("first", 3)
        engine.submit(request("second", prompt_of(100), max_tokens=10))
        recorder.wait_for("first", "second")
    assert ["first", "second"] in recorder.steps
    assert_equal_tokens(MODEL, prompt_of(10), recorder.answers["first"].token_ids)
    assert_equal_tokens(MODEL, prompt_of(100), recorder.answers["second"].token_ids)


def test_more_sequences_than_pages_take_turns_and_lose_nothing() -> None:
    recorder = Recorder()
    ids = [str(n) for n in range(5)]
    # Each fits alone (100 of 128 tokens), all together do not.
    with running(MODEL, recorder, kv_cache_bytes=pool_of(128), page_size=4) as engine:
        for n in range(5):
            engine.submit(request(ids[n], prompt_of(20, seed=n), max_tokens=80))
        answers = recorder.wait_for(*ids)
        assert engine.counters().kv_cache_usage == 0
    for n, answer in enumerate(answers):
        assert answer.num_tokens == 80
        assert_equal_tokens(MODEL, prompt_of(20, seed=n), answer.token_ids)


def test_a_seed_gives_the_same_tokens_alone_and_in_company() -> None:
    alone, company = Recorder(), Recorder()
    seeded = request("seeded", prompt_of(12), temperature=1.0, top_p=0.9, seed=11, max_tokens=30)
    with running(MODEL, alone) as engine:
        engine.submit(seeded)
        alone.wait_for("seeded")
    with running(MODEL, company) as engine:
        for n in range(4):
            engine.submit(request(f"other {n}", prompt_of(5 + 9 * n), temperature=0.5 * n, max_tokens=25))
        engine.submit(seeded)
        company.wait_for("seeded")
    assert alone.answers["seeded"].token_ids == company.answers["seeded"].token_ids


def test_logprobs_are_the_models_own() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("r", prompt_of(9), temperature=1.5, seed=4, logprobs=3, presence_penalty=1.0))
        (answer,) = recorder.wait_for("r")
    expected = reference_logits(MODEL, prompt_of(9), answer.token_ids).log_softmax(dim=-1)
    entries = [token for delta in answer.deltas for token in delta.logprobs]
    assert len(entries) == 8
    for step, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[step, entry.token_id]), abs=1e-4)
        top = expected[step].topk(3)
        assert [logprob for *_, logprob in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_long_stream_of_text_is_the_text_of_its_tokens() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("r", prompt_of(9), temperature=1.2, seed=4, max_tokens=200))
        (answer,) = recorder.wait_for("r")
    tokenizer = make_tokenizer()
    assert answer.text == tokenizer.backend_tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert len(answer.deltas) == 200


def test_prompts_that_begin_alike_share_pages() -> None:
    recorder = Recorder()
    common = prompt_of(48)
    with running(MODEL, recorder, page_size=16) as engine:
        engine.submit(request("first", common))
        recorder.wait_for("first")
        engine.submit(request("second", [*common, *prompt_of(5)]))
        engine.submit(request("third", common))
        first, second, third = recorder.wait_for("first", "second", "third")
        assert engine.counters().kv_cache_usage == 0
    # Of a whole prompt the last page is computed again, for its last token's logits.
    assert [a.last.num_cached_tokens for a in (first, second, third)] == [0, 48, 32]
    assert_equal_tokens(MODEL, [*common, *prompt_of(5)], second.token_ids)
    assert third.token_ids == first.token_ids


def test_without_prefix_sharing_nothing_is_cached() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, page_size=16, prefix_sharing=False) as engine:
        engine.submit(request("first", prompt_of(48)))
        recorder.wait_for("first")
        engine.submit(request("second", prompt_of(48)))
        (second,) = recorder.wait_for("second")
    assert second.last.num_cached_tokens == 0


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_sequence_at_once_and_frees_its_pages() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("free", prompt_of(6), max_tokens=40))
        (free,) = recorder.wait_for("free")
        stop = free.text[9:13]
        assert free.text.find(stop) == 9
        engine.submit(request("stopped", prompt_of(6), max_tokens=400, stop=(stop,)))
        (stopped,) = recorder.wait_for("stopped")
    assert stopped.text == free.text[:9]
    assert (stopped.finish_reason, stopped.last.stop_reason) == ("stop", stop)
    assert recorder.usage_at_end["stopped"] == 0
    # Not one step more than the stop string needs.
    tokenizer = make_tokenizer().backend_tokenizer
    needed = next(n for n in range(40) if stop in tokenizer.decode(free.token_ids[:n]))
    assert stopped.num_tokens == needed


def test_every_end_token_of_the_generation_config_ends_a_sequence() -> None:
    model = eager_model()
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("free", prompt_of(6), max_tokens=10))
        (free,) = recorder.wait_for("free")
    fourth = free.token_ids[3]
    assert fourth not in free.token_ids[:3]
    model.generation_config.eos_token_id = [EOS_ID, fourth]
    recorder = Recorder()
    with running(model, recorder) as engine:
        engine.submit(request("ended", prompt_of(6), max_tokens=10, ignore_eos=False))
        (ended,) = recorder.wait_for("ended")
    assert (ended.finish_reason, ended.num_tokens) == ("stop", 4)
    assert ended.token_ids == free.token_ids[:3]


def test_cancelling_ends_a_running_request_and_frees_its_pages() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        engine.submit(request("r", prompt_of(100), max_tokens=400))
        recorder.wait_for_tokens("r", 2)
        assert engine.counters().requests_running == 1
        assert engine.counters().kv_cache_usage > 0
        engine.cancel("r")
        (answer,) = recorder.wait_for("r")
        assert answer.finish_reason == "cancelled"
        assert answer.num_tokens < 400
        assert recorder.usage_at_end["r"] == 0
        assert engine.counters().requests_running == 0


def test_cancelling_takes_a_waiting_request_off_the_queue() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, max_running=1) as engine:
        engine.submit(request("running", prompt_of(5), max_tokens=300))
        recorder.wait_for_tokens("running")
        engine.submit(request("waiting", prompt_of(5)))
        engine.cancel("waiting")
        (waiting,) = recorder.wait_for("waiting")
        assert (waiting.finish_reason, waiting.num_tokens) == ("cancelled", 0)
        engine.cancel("running")
        engine.cancel("never heard of")
        recorder.wait_for("running")


def test_stopping_the_engine_fails_what_is_left() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, max_running=1) as engine:
        engine.submit(request("running", prompt_of(5), max_tokens=400))
        recorder.wait_for_tokens("running")
        engine.submit(request("waiting", prompt_of(5)))
        engine.stop()
        for answer in recorder.wait_for("running", "waiting"):
            assert (answer.finish_reason, answer.last.error) == ("error", "the engine was stopped")
        assert not engine.is_alive
        with pytest.raises(EngineStoppedError, match="not running"):
            engine.submit(request("late", prompt_of(5)))


# -- admission ---------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, max_running=1, max_waiting=2) as engine:
        recorder.hold()
        for n in range(3):
            engine.submit(request(str(n), prompt_of(4)))
        with pytest.raises(QueueFullError, match="holds 3 requests") as refusal:
            engine.submit(request("3", prompt_of(4)))
        assert refusal.value.retry_after_s >= 1
        recorder.release()
        recorder.wait_for("0", "1", "2")
        engine.submit(request("3", prompt_of(4)))
        recorder.wait_for("3")


def test_prompt_and_completion_beyond_the_context_are_refused_with_both_numbers() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, max_model_len=100) as engine:
        assert engine.max_context_tokens == 100
        with pytest.raises(ContextLengthError, match=r"prompt \(60 tokens\).*max_tokens \(41\).*101.*context of 100"):
            engine.submit(request("r", prompt_of(60), max_tokens=41))
        engine.submit(request("r", prompt_of(60), max_tokens=40))
        (answer,) = recorder.wait_for("r")
    assert answer.num_tokens == 40


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    with running(MODEL, Recorder()) as engine:
        assert engine.max_context_tokens == 512
    with pytest.raises(ConfigError, match="--max-model-len must be at most 512, .* got 513"):
        ContinuousEngine(MODEL, make_tokenizer(), EngineConfig(max_model_len=513))


def test_a_context_beyond_the_pages_is_refused_if_it_was_set() -> None:
    config = EngineConfig(max_model_len=100, kv_cache_bytes=pool_of(64), page_size=16)
    engine = ContinuousEngine(MODEL, make_tokenizer(), config, lambda deltas: None)
    with pytest.raises(ConfigError, match=r"--max-model-len must be at most 64, the tokens that the KV memory .* 100"):
        engine.start()


def test_a_request_that_could_never_fit_the_pages_is_refused() -> None:
    recorder = Recorder()
    with running(MODEL, recorder, kv_cache_bytes=pool_of(64), page_size=16) as engine:
        assert engine.max_context_tokens == 64
        with pytest.raises(ContextLengthError, match="context of 64"):
            engine.submit(request("r", prompt_of(60), max_tokens=5))
        engine.submit(request("r", prompt_of(60), max_tokens=4))
        (answer,) = recorder.wait_for("r")
    assert answer.num_tokens == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("r", []), "prompt must hold at least one token"),
        (request("r", [3, VOCAB_SIZE]), r"prompt tokens must be in \[0, 320\), got 3 to 320"),
        (request("r", [3], stop_token_ids=(320,)), r"stop_token_ids tokens must be in \[0, 320\), got 320"),
        (request("r", [3], logit_bias={400: 1.0}), r"logit_bias tokens must be in \[0, 320\), got 400"),
    ],
)
def test_a_request_that_the_model_cannot_take_is_refused(bad: object, message: str) -> None:
    engine = ContinuousEngine(MODEL, make_tokenizer(), EngineConfig())
    with pytest.raises(RequestError, match=message):
        engine.submit(bad)  # type: ignore[arg-type]


def test_an_id_in_use_is_refused() -> None:
    recorder = Recorder()
    with running(MODEL, recorder) as engine:
        recorder.hold()
        engine.submit(request("r", prompt_of(4)))
        with pytest.raises(RequestError, match="'r' is being generated"):
            engine.submit(request("r", prompt_of(4)))


# -- failures ----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_step_fails_that_batch_and_no_other() -> None:
    model, experts = dispatched_model()
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
            assert answer.finish_reason == "error"
            assert answer.last.error == "L01.E003 could not be computed anywhere"
        assert waiting.finish_reason == "length"
        assert engine.counters().kv_cache_usage == 0
        engine.submit(request("later", prompt_of(9)))
        (later,) = recorder.wait_for("later")
    for answer in (waiting, later):
        assert_equal_tokens(model, prompt_of(9), answer.token_ids)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_sequence_whose_text_cannot_be_made_fails_alone(family: str) -> None:
    class BrokenDecoder:
        def feed(self, token_id: int) -> str:
            raise ValueError(f"no text for {token_id}")

        def flush(self) -> str:
            return ""

    recorder = Recorder()
    with running(eager_model(family), recorder) as engine:
        recorder.hold()
        engine.submit(request("bad", prompt_of(5), max_tokens=50))
        engine.submit(request("good", prompt_of(6), max_tokens=50))
        engine._live["bad"]._decoder = BrokenDecoder()
        recorder.release()
        bad, good = recorder.wait_for("bad", "good")
        assert engine.counters().kv_cache_usage == 0
    assert bad.finish_reason == "error"
    assert str(bad.last.error).startswith("ValueError: no text for ")
    assert good.num_tokens == 50


def test_a_failed_prefill_leaves_nothing_for_prompts_that_begin_alike() -> None:
    model, experts = dispatched_model()
    recorder = Recorder()
    with running(model, recorder, page_size=4) as engine:
        experts.fail_next = RuntimeError("boom")
        engine.submit(request("failed", prompt_of(30)))
        (failed,) = recorder.wait_for("failed")
        engine.submit(request("again", prompt_of(30)))
        (again,) = recorder.wait_for("again")
    assert failed.last.error == "RuntimeError: boom"
    assert again.last.num_cached_tokens == 0
    assert_equal_tokens(model, prompt_of(30), again.token_ids)


def test_a_receiver_that_fails_does_not_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    seen = threading.Event()

    def on_step(deltas: list[GenerationDelta]) -> None:
        if deltas[0].finish_reason is not None:
            seen.set()
        raise ValueError("receiver")

    engine = ContinuousEngine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=1 << 22), on_step)
    engine.start()
    try:
        engine.submit(request("r", prompt_of(4)))
        assert seen.wait(30)
        assert engine.is_alive
    finally:
        engine.stop()
    assert "on_step failed" in caplog.text


def test_what_keeps_the_engine_from_starting_is_raised_by_start() -> None:
    attention = MODEL.config._attn_implementation
    engine = ContinuousEngine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=100), lambda deltas: None)
    with pytest.raises(ConfigError, match="kv_cache_bytes must hold at least one page of 32 tokens"):
        engine.start()
    assert not engine.is_alive
    assert MODEL.config._attn_implementation == attention


def test_the_model_gets_its_attention_back() -> None:
    attention = MODEL.config._attn_implementation
    with running(MODEL, Recorder()):
        assert MODEL.config._attn_implementation != attention
    assert MODEL.config._attn_implementation == attention
