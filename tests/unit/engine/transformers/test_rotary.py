"""Rotary factors that depend on the length of a sequence: LongRoPE, dynamic NTK, and PhiMoE's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeless.core.errors import ConfigError
from moeless.engine.assemble import engine_in_process
from moeless.engine.config import EngineConfig
from moeless.engine.transformers import rotary as module
from moeless.engine.transformers.build import build_engine, paging_obstacle
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.hooks import PagedBatcher, kv_bytes_per_token
from moeless.engine.transformers.rotary import SequenceRotary, changing_at, reset_factors
from moeless.engine.transformers.static_batch import StaticBatchEngine
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import make_checkpoint, make_model, make_tokenizer
from tests.unit.engine.support import Answer, Recorder, prompt_of, request, running

CHANGE = 24
"""Length beyond which the factors of the models here change."""


def longrope(num_pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": CHANGE,
        "short_factor": [1.0 + 0.1 * n for n in range(num_pairs)],
        "long_factor": [2.0 + n for n in range(num_pairs)],
        **more,
    }


PHIMOE_SCALES = {"short_mscale": 1.0, "long_mscale": 1.6}
DYNAMIC: dict[str, Any] = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0},
    "max_position_embeddings": CHANGE,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": CHANGE}
BY_LENGTH: dict[str, tuple[str, dict[str, Any], type]] = {
    "longrope, paged": ("mixtral", {"head_dim": 8, "rope_parameters": longrope(4)}, ContinuousEngine),
    "longrope, static": ("deepseek_v3", {"rope_parameters": longrope(4)}, StaticBatchEngine),
    "longrope, recurrent states": ("qwen3_next", {"rope_parameters": longrope(2)}, StaticBatchEngine),
    "longrope of phimoe": ("phimoe", {"rope_parameters": longrope(4, **PHIMOE_SCALES)}, ContinuousEngine),
    "yarn of phimoe": ("phimoe", {"rope_parameters": {**YARN, **PHIMOE_SCALES}}, ContinuousEngine),
    "longrope of one layer type": (
        "mellum",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": longrope(8),
            }
        },
        ContinuousEngine,
    ),
    "dynamic, paged": ("mixtral", {"head_dim": 8, **DYNAMIC}, ContinuousEngine),
    "dynamic, static": ("deepseek_v3", DYNAMIC, StaticBatchEngine),
    "dynamic of hunyuan": ("hunyuan_v1_moe", DYNAMIC, ContinuousEngine),
}
"""Family, settings of its config, and the engine that serves it."""
NOT_BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("mixtral", {}),
    "linear": ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "yarn": ("qwen3_moe", {"rope_parameters": YARN}),
    "llama3": (
        "mixtral",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": CHANGE,
            },
        },
    ),
    "proportional": (
        "mixtral",
        {"head_dim": 8, "rope_parameters": {"rope_type": "proportional", "rope_theta": 10_000.0}},
    ),
    "by layer type": ("gemma4_text", {}),
    "dynamic with a factor of 1": (
        "hunyuan_v1_moe",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 10_000.0}},
    ),
}


def model_of(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    model = make_model(family, **settings)
    model.set_experts_implementation("eager")
    return model


@torch.inference_mode()
def assert_tokens_of_each_prefix_alone(model: PreTrainedModel, prompt: list[int], answer: Answer) -> None:
    """Each token, and its log-probability, is that of the reference model for exactly the tokens before it."""
    assert answer.last.error is None
    tokens = [token for delta in answer.deltas for token in delta.logprobs]
    assert len(tokens) == answer.num_tokens > 0
    for step, token in enumerate(tokens):
        reset_factors(model)
        prefix = [*prompt, *answer.token_ids[:step]]
        logits = model(torch.tensor([prefix]), use_cache=False).logits[0, -1]
        assert logits.max() - logits[token.token_id] <= 1e-3, f"after {len(prefix)} tokens"
        assert abs(float(logits.log_softmax(dim=-1)[token.token_id]) - token.logprob) <= 1e-3, (
            f"after {len(prefix)} tokens"
        )


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_sequence_has_its_own_factors_whatever_the_batch_and_the_chunks(name: str) -> None:
    family, settings, kind = BY_LENGTH[name]
    model = model_of(family, settings)
    lengths = {
        "short": 5,
        "grows": CHANGE - 4,
        "last of the short": CHANGE,
        "first of the long": CHANGE + 1,
        "long": 60,
    }
    recorder = Recorder()
    with running(model, recorder, max_batch_tokens=16, page_size=4) as engine:
        assert isinstance(engine, kind)
        for request_id, length in lengths.items():
            engine.submit(request(request_id, prompt_of(length), max_tokens=8))
        answers = recorder.wait_for(*lengths)
        assert engine.counters().requests_running == engine.counters().requests_waiting == 0
        assert engine.counters().kv_cache_usage == 0
    for length, answer in zip(lengths.values(), answers, strict=True):
        assert answer.num_tokens == 8
        assert_tokens_of_each_prefix_alone(model, prompt_of(length), answer)


@pytest.mark.parametrize("name", NOT_BY_LENGTH)
def test_other_rope_types_are_left_alone(name: str) -> None:
    family, settings = NOT_BY_LENGTH[name]
    model = model_of(family, settings)
    rotary = SequenceRotary(model)
    assert not rotary.depends_on_length
    assert rotary.base_length is None
    assert rotary.factors_of(5) == rotary.factors_of(500)
    rotary.install()
    assert all("forward" not in part.__dict__ for part in model.modules())


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_length_at_which_factors_change_is_found(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    rotary = SequenceRotary(model_of(family, settings))
    assert rotary.base_length == CHANGE
    assert rotary.factors_of(1) == rotary.factors_of(CHANGE) != rotary.factors_of(CHANGE + 1)
    is_dynamic = "dynamic" in name
    assert rotary.changes_with_every_token == is_dynamic
    assert (rotary.factors_of(CHANGE + 1) != rotary.factors_of(CHANGE + 2)) == is_dynamic


@pytest.mark.parametrize("name", ["longrope, paged", "longrope of phimoe", "dynamic, paged"])
def test_cosines_of_a_mixed_pass_are_those_of_new_models(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    model = model_of(family, settings)
    rotary = SequenceRotary(model)
    rotary.install()
    lengths = [6, CHANGE + 9, CHANGE, CHANGE + 20]
    positions = torch.stack([torch.arange(length - 4, length) for length in lengths])
    embedding: Any = model.model.rotary_emb
    with rotary.lengths(lambda: np.array(lengths)[:, None], torch.device("cpu")):
        found = embedding(torch.zeros(1), position_ids=positions)
    rotary.remove()
    for row, length in enumerate(lengths):
        alone = model_of(family, settings).model.rotary_emb  # type: ignore[operator]
        expected = alone(torch.zeros(1), position_ids=torch.arange(length)[None])
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[row], theirs[0, -4:])


def test_a_pass_of_no_batch_is_that_of_a_new_model() -> None:
    model = model_of("mixtral", {"head_dim": 8, **DYNAMIC})
    rotary = SequenceRotary(model)
    rotary.install()
    token_ids = torch.tensor([prompt_of(CHANGE + 10)])
    with torch.inference_mode():
        model(torch.tensor([prompt_of(CHANGE + 90)]))  # transformers would go on with the factors of this one
        found = model(token_ids).logits
        expected = model_of("mixtral", {"head_dim": 8, **DYNAMIC})(token_ids).logits
    rotary.remove()
    assert torch.equal(found, expected)


def test_pages_are_shared_among_short_sequences_only() -> None:
    model = model_of("mixtral", {"head_dim": 8, "rope_parameters": longrope(4)})
    recorder = Recorder()
    prompts = {"a": prompt_of(12), "b": prompt_of(12), "long": [*prompt_of(12), *prompt_of(40)], "c": prompt_of(12)}
    with running(model, recorder, page_size=4) as engine:
        for request_id, prompt in prompts.items():
            engine.submit(request(request_id, prompt))
            recorder.wait_for(request_id)
        engine.submit(request("longer", [*prompt_of(12), *prompt_of(40), 7, 8]))
        recorder.wait_for("longer")
    cached = {request_id: answer.last.num_cached_tokens for request_id, answer in recorder.answers.items()}
    assert cached == {"a": 0, "b": 8, "long": 0, "c": 8, "longer": 0}
    for request_id, prompt in prompts.items():
        assert_tokens_of_each_prefix_alone(model, prompt, recorder.answers[request_id])


@pytest.mark.parametrize("name", ["dynamic, paged", "dynamic, static"])
def test_a_sequence_that_is_computed_anew_at_each_token_lets_others_begin_and_decode(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    recorder = Recorder()
    with running(model_of(family, settings), recorder, max_batch_tokens=16) as engine:
        recorder.hold()
        engine.submit(request("long", prompt_of(40), max_tokens=40))
        recorder.wait_for_tokens("long", 1)
        engine.submit(request("short", prompt_of(5), max_tokens=8))
        recorder.release()
        recorder.wait_for("short", "long")
    ends = {answer: max(n for n, step in enumerate(recorder.steps) if answer in step) for answer in ("short", "long")}
    assert ends["short"] < ends["long"]


@pytest.mark.parametrize("name", ["longrope, paged", "dynamic, paged", "longrope, static", "dynamic, static"])
def test_more_sequences_than_memory_holds_take_turns_while_they_outgrow_their_factors(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    model = model_of(family, settings)
    token_bytes = kv_bytes_per_token(model) if "paged" in name else 3 * (16 + 8) * 4
    recorder = Recorder()
    with running(model, recorder, kv_cache_bytes=token_bytes * 72, page_size=4, max_batch_tokens=16) as engine:
        for number in range(5):
            engine.submit(request(str(number), prompt_of(CHANGE - 6 + number, seed=number), max_tokens=12))
        answers = recorder.wait_for(*map(str, range(5)))
        assert engine.counters().kv_cache_usage == 0
    for number, answer in enumerate(answers):
        assert answer.num_tokens == 12
        assert_tokens_of_each_prefix_alone(model, prompt_of(CHANGE - 6 + number, seed=number), answer)


@pytest.mark.parametrize("name", ["dynamic, paged", "dynamic, static"])
def test_a_cancelled_sequence_that_waits_to_be_computed_anew_is_gone(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    recorder = Recorder()
    with running(model_of(family, settings), recorder) as engine:
        recorder.hold()
        engine.submit(request("long", prompt_of(40), max_tokens=100))
        recorder.wait_for_tokens("long", 1)
        engine.cancel("long")
        recorder.release()
        (answer,) = recorder.wait_for("long")
        assert answer.finish_reason == "cancelled"
        engine.submit(request("next", prompt_of(5)))
        recorder.wait_for("next")
        assert engine.counters().requests_waiting == 0


def test_a_packed_phimoe_answers_as_transformers_does(tmp_path: Path) -> None:
    settings = BY_LENGTH["longrope of phimoe"][1]
    pack_checkpoint(make_checkpoint("phimoe", tmp_path / "checkpoint", **settings), tmp_path / "packed")
    recorder = Recorder()
    config = EngineConfig(kv_cache_bytes=1 << 22, num_threads=1)
    with engine_in_process(PackedModel.open(tmp_path / "packed"), make_tokenizer(), config) as engine:
        engine.set_on_step(recorder)
        engine.start()
        for length in (5, CHANGE - 4, 60):
            engine.submit(request(str(length), prompt_of(length)))
        recorder.wait_for("5", str(CHANGE - 4), "60")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", experts_implementation="eager")
    for length in (5, CHANGE - 4, 60):
        assert_tokens_of_each_prefix_alone(reference, prompt_of(length), recorder.answers[str(length)])


@pytest.mark.parametrize("name", ["longrope, paged", "longrope of phimoe", "dynamic, paged"])
def test_the_check_at_start_notices_factors_of_the_longest_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, settings, _ = BY_LENGTH[name]
    model = model_of(family, settings)
    assert paging_obstacle(model, make_tokenizer()) is None
    monkeypatch.setattr(SequenceRotary, "install", lambda self: None)
    assert str(paging_obstacle(model, make_tokenizer())).startswith("log-probabilities differ from the model's own by")


def test_the_check_at_start_notices_pages_with_former_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("phimoe", BY_LENGTH["longrope of phimoe"][1])
    monkeypatch.setattr(PagedBatcher, "_recompute_outgrown", lambda self, states: None)
    assert str(paging_obstacle(model, make_tokenizer())).startswith("log-probabilities differ from the model's own by")


def test_a_model_that_no_engine_serves_rightly_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3", BY_LENGTH["longrope, static"][1])
    monkeypatch.setattr(SequenceRotary, "install", lambda self: None)
    with pytest.raises(ConfigError) as refusal:
        build_engine(model, make_tokenizer(), EngineConfig())
    assert "model_type 'deepseek_v3' with rope_type 'longrope' cannot be served" in str(refusal.value)
    assert "static: log-probabilities differ from the model's own by" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_factors_that_cannot_be_computed_alone_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no position_ids")

    monkeypatch.setattr(module, "_forward_alone", fails)
    model = model_of("mixtral", {"head_dim": 8, **DYNAMIC})
    with pytest.raises(ConfigError, match="rope_type 'dynamic' of MixtralRotaryEmbedding .* no position_ids"):
        SequenceRotary(model)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_moving_the_change_for_a_check_leaves_the_model_as_it_was(name: str) -> None:
    family, settings, _ = BY_LENGTH[name]
    model = model_of(family, settings)
    with changing_at(model, 8):
        assert SequenceRotary(model).base_length == 8
    assert SequenceRotary(model).base_length == CHANGE
    assert model.config.to_dict() == model_of(family, settings).config.to_dict()
