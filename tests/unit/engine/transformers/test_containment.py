"""One sequence's fault does not touch the others, on both engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moeless.engine.prediction import PredictionObserver
from moeless.engine.routing_recorder import RecordingOptions, RoutingRecorder
from moeless.engine.transformers.sequence import Sequence
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.live import LiveConfig, LivePredictor
from tests.unit.engine.routed import PAGED, STATIC, LoadFamily, dispatched
from tests.unit.engine.support import Recorder, eager_model, prompt_of, request, running

POISON = 77
"""A token whose embedding is NaN."""
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")
"""Full attention and sliding attention with sinks in pages; latent attention and recurrent states in a static batch."""
AVOIDING: dict[str, Any] = {"max_tokens": 12, "logit_bias": {0: -1e4, POISON: -1e4}}
LENGTHS = (1, 5, 9, 40)


def good_prompt(length: int) -> list[int]:
    return [token_id if token_id not in (0, POISON) else POISON + 1 for token_id in prompt_of(length)]


def poisoned(model: PreTrainedModel, *token_ids: int) -> PreTrainedModel:
    with torch.no_grad():
        for token_id in token_ids:
            model.get_input_embeddings().weight[token_id] = torch.nan  # type: ignore[index]
    return model


def generate_good(engine: Any, recorder: Recorder) -> list[list[int]]:
    """Tokens of requests that have no fault."""
    names = [f"good-{len(recorder.answers)}-{length}" for length in LENGTHS]
    for name, length in zip(names, LENGTHS, strict=True):
        engine.submit(request(name, good_prompt(length), **AVOIDING))
    answers = recorder.wait_for(*names)
    assert [answer.finish_reason for answer in answers] == ["length"] * len(names)
    return [answer.token_ids for answer in answers]


BAD: dict[str, dict[str, Any]] = {
    "at the prompt's end": {"prompt": [8, 9, POISON]},
    "at the prompt's beginning": {"prompt": [POISON, *range(8, 50)]},
    "in a generated token": {"prompt": [8, 9], "logit_bias": {POISON: 1e4}},
    "drawn": {"prompt": [POISON, 9], "temperature": 1.0, "top_p": 0.9},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_are_not_finite_end_their_sequence_alone(family: str) -> None:
    model = poisoned(eager_model(family), POISON)
    recorder = Recorder()
    with running(model, recorder, max_running=16) as engine:
        expected = generate_good(engine, recorder)
        for name, params in BAD.items():
            engine.submit(request(name, **({"max_tokens": 12} | params)))
        assert generate_good(engine, recorder) == expected
        for answer in recorder.wait_for(*BAD):
            assert answer.finish_reason == "error"
            assert "not finite" in (answer.last.error or "")
        # What they left in the KV memory harms nobody either.
        assert generate_good(engine, recorder) == expected
        assert engine.counters().kv_cache_usage == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_temperature_that_float32_cannot_hold_is_greedy_and_harms_nobody(family: str) -> None:
    recorder = Recorder()
    with running(eager_model(family), recorder, max_running=16) as engine:
        expected = generate_good(engine, recorder)
        engine.submit(request("tiny", good_prompt(9), temperature=1e-46, **AVOIDING))
        assert generate_good(engine, recorder) == expected
        (tiny,) = recorder.wait_for("tiny")
        assert tiny.token_ids == expected[LENGTHS.index(9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_that_pads_a_batch_may_be_anything(family: str) -> None:
    recorder = Recorder()
    with running(poisoned(eager_model(family), 0, POISON), recorder, max_running=16) as engine:
        alone = []
        for length in LENGTHS:
            engine.submit(request(f"alone-{length}", good_prompt(length), **AVOIDING))
            alone += [answer.token_ids for answer in recorder.wait_for(f"alone-{length}")]
        assert generate_good(engine, recorder) == alone


def test_pages_of_a_failed_request_are_not_shared() -> None:
    model = eager_model()
    healthy = model.get_input_embeddings().weight[POISON].clone()  # type: ignore[index]
    prompt = [POISON, *good_prompt(40)]
    recorder = Recorder()
    with running(poisoned(model, POISON), recorder, page_size=4, max_batch_tokens=8) as engine:
        engine.submit(request("bad", prompt))
        recorder.wait_for("bad")
        with torch.no_grad():  # the fault was a passing one
            model.get_input_embeddings().weight[POISON] = healthy  # type: ignore[index]
        engine.submit(request("again", prompt))
        engine.submit(request("shared", prompt))
        answers = recorder.wait_for("again", "shared")
    assert [answer.finish_reason for answer in answers] == ["length", "length"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_fault_in_one_sequences_text_is_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = Sequence._describe

    def fail_for_one(self: Sequence, raw: Any, **options: Any) -> Any:
        if self.request_id == "bad" and self.num_generated == 3:
            raise RuntimeError("no text for that")
        return describe(self, raw, **options)

    monkeypatch.setattr(Sequence, "_describe", fail_for_one)
    recorder = Recorder()
    with running(eager_model(family), recorder, max_running=16) as engine:
        expected = generate_good(engine, recorder)
        engine.submit(request("bad", [8, 9]))
        assert generate_good(engine, recorder) == expected
        (bad,) = recorder.wait_for("bad")
    assert (bad.finish_reason, bad.last.error) == ("error", "RuntimeError: no text for that")


@pytest.mark.parametrize("name", [PAGED, STATIC])
def test_nan_passes_the_dispatcher_and_its_observers_without_harm_to_others(name: str, load_family: LoadFamily) -> None:
    family = load_family(name)
    healthy = family.backbone.get_input_embeddings().weight[POISON].clone()  # type: ignore[index]
    recorder = Recorder()
    poisoned(family.backbone, POISON)
    try:
        with dispatched(family, recorder, max_running=16) as engine:
            options = RecordingOptions(max_tokens=4000, hidden_layers=tuple(range(family.metadata.num_layers)))
            before = RoutingRecorder(engine.observers, family.metadata, options)
            before.start()
            expected = generate_good(engine, recorder)
            config = FitConfig(kinds=("gate", "transition"), distances=(1,))
            live = LivePredictor(fit_predictors(before.take_trace(), config), LiveConfig(max_share=1.0))
            engine.observers.add(PredictionObserver(live))
            beside = RoutingRecorder(engine.observers, family.metadata, options)
            beside.start()
            for bad, params in BAD.items():
                engine.submit(request(bad, **({"max_tokens": 12} | params)))
            assert generate_good(engine, recorder) == expected
            assert {answer.finish_reason for answer in recorder.wait_for(*BAD)} == {"error"}
            trace = beside.take_trace()
            num_forecasts = sum(row.num_forecasts for row in live.accuracy())
            assert generate_good(engine, recorder) == expected
    finally:
        with torch.no_grad():
            family.backbone.get_input_embeddings().weight[POISON] = healthy  # type: ignore[index]
    assert np.isfinite(trace.weights_TLk).all()
    assert all(np.isfinite(hidden).all() for hidden in trace.hidden.values())
    assert num_forecasts > 0
    assert sum(row.num_forecasts for row in live.accuracy()) > num_forecasts
